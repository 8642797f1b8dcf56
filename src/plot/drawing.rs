//! An SVG as it grows: lines, cells, axes and legends, in two themes.

use std::fmt::Write as _;

use super::frame::{BOTTOM, Columns, Frame, LEGEND_LINE, RIGHT, TOP};
use super::scale::Scale;
use super::{percent, shown};
use crate::page::MARK;
use crate::spectrum::Spectrum;

/// Okabe and Ito's colours, which colour-blind readers tell apart, their yellow and black replaced by what shows on white
/// and on black; dashes and markers say the same once more.
const COLOURS: [[&str; 8]; 2] = [
    [
        "#0072b2", "#d98a00", "#009e73", "#cc6aa0", "#d55e00", "#3ba3dc", "#6a3d9a", "#666666",
    ],
    [
        "#4fa8e8", "#f0b030", "#2cc79a", "#e79cc6", "#ff8446", "#9ad6fa", "#b39dff", "#b0b0b0",
    ],
];

/// Viridis in nine steps: even in lightness, and so readable without any colour.
const VIRIDIS: [[u8; 3]; 9] = [
    [0x44, 0x01, 0x54],
    [0x47, 0x2d, 0x7b],
    [0x3b, 0x52, 0x8b],
    [0x2c, 0x72, 0x8e],
    [0x21, 0x91, 0x8c],
    [0x28, 0xae, 0x80],
    [0x5e, 0xc9, 0x62],
    [0xad, 0xdc, 0x30],
    [0xfd, 0xe7, 0x25],
];

/// A rectangle of a table of colours.
pub struct Cell {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

/// An SVG as it grows.
pub struct Drawing {
    text: String,
}

impl Drawing {
    pub fn new(id: &str, title: &str, desc: &str, frame: &Frame) -> Self {
        Self::sized(id, title, desc, frame, frame.height)
    }

    /// `inside` is the height of whatever is highest between title and axis.
    pub fn sized(id: &str, title: &str, desc: &str, frame: &Frame, inside: f64) -> Self {
        // the title needs room even over a narrow plot
        let width = f64::max(frame.right() + RIGHT, 560.0);
        let height = TOP + inside + BOTTOM;
        let [width, height] = [width, height].map(number);
        let (shown, desc) = (escape(title), escape(desc.trim()));
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">{MARK}\n\
             <title id=\"{id}-title\">{shown}</title>\n<desc id=\"{id}-desc\">{desc}</desc>\n\
             <style>{}</style>\n<rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>\n",
            style()
        );
        let mut drawing = Self { text };
        drawing.text(16.0, 24.0, "start", "head", title);
        drawing
    }

    fn put(&mut self, what: std::fmt::Arguments) {
        self.text.write_fmt(what).expect("a string takes any text");
        self.text.push('\n');
    }

    pub fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let ([x, y], text) = ([x, y].map(number), escape(text));
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        ));
    }

    pub fn rule(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(number);
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"
        ));
    }

    pub fn x_axis(&mut self, frame: &Frame, scale: &Scale, label: &str) {
        for (value, text) in &scale.ticks {
            let x = frame.x(scale.at(*value));
            self.rule("grid", (x, frame.top), (x, frame.bottom()));
            self.rule("axis", (x, frame.bottom()), (x, frame.bottom() + 4.0));
            self.text(x, frame.bottom() + 18.0, "middle", "soft", text);
        }
        let (left, right) = (frame.left, frame.right());
        self.rule("axis", (left, frame.bottom()), (right, frame.bottom()));
        self.text(
            left + frame.width / 2.0,
            frame.bottom() + 39.0,
            "middle",
            "ink",
            label,
        );
    }

    pub fn y_axis(&mut self, frame: &Frame, scale: &Scale, label: &str) {
        for (value, text) in &scale.ticks {
            let y = frame.y(scale.at(*value));
            self.rule("grid", (frame.left, y), (frame.right(), y));
            self.rule("axis", (frame.left - 4.0, y), (frame.left, y));
            self.text(frame.left - 8.0, y + 4.0, "end", "soft", text);
        }
        let left = frame.left;
        self.rule("axis", (left, frame.top), (left, frame.bottom()));
        let [x, y] = [left - 54.0, frame.top + frame.height / 2.0].map(number);
        let label = escape(label);
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" transform=\"rotate(-90 {x} {y})\" text-anchor=\"middle\" class=\"ink\">{label}</text>"
        ));
    }

    pub fn layer_axis(&mut self, frame: &Frame, columns: &Columns) {
        let (bottom, end) = (frame.bottom(), frame.left + columns.inner_width());
        if !columns.layers.is_empty() {
            self.rule("axis", (frame.left, bottom), (end, bottom));
            let middle = (frame.left + end) / 2.0;
            self.text(middle, bottom + 39.0, "middle", "ink", "layer");
        }
        let widest = columns.layers.last().map_or(1, |l| l.to_string().len());
        let room = 10.0 + 7.0 * widest as f64;
        let every = round_up((room / columns.step).ceil() as usize);
        for (i, layer) in columns.layers.iter().enumerate().step_by(every) {
            let x = frame.left + columns.step * (i as f64 + 0.5);
            self.rule("axis", (x, bottom), (x, bottom + 4.0));
            self.text(x, bottom + 18.0, "middle", "soft", &layer.to_string());
        }
        if let Some(outside) = columns.outside {
            let (right, step) = (frame.right(), columns.outside_step());
            self.rule("axis", (right - step, bottom), (right, bottom));
            self.text(right - step / 2.0, bottom + 18.0, "middle", "soft", outside);
        }
    }

    /// Between two lines, which are drawn thin: where many bands overlap, their edges still tell them apart.
    pub fn band(&mut self, series: usize, upper: &[(f64, f64)], lower: &[(f64, f64)]) {
        if upper.len() < 2 {
            return;
        }
        let (colour, dash) = (series % 8, series / 4 % 3);
        let back: Vec<(f64, f64)> = lower.iter().rev().copied().collect();
        let [over, under] = [upper, lower].map(path);
        let outline = path(&[upper, &back].concat());
        self.put(format_args!(
            "<path class=\"f{colour} band\" d=\"{outline}Z\"/>"
        ));
        self.put(format_args!(
            "<path class=\"s{colour} d{dash} edge\" d=\"{over}{under}\"/>"
        ));
    }

    pub fn line(&mut self, series: usize, points: &[(f64, f64)], tip: &str) {
        if points.len() < 2 {
            return;
        }
        let (colour, dash) = (series % 8, series / 4 % 3);
        let line = if points.len() > 80 {
            "line thin"
        } else {
            "line"
        };
        let (path, tip) = (path(points), escape(tip));
        self.put(format_args!(
            "<path class=\"s{colour} d{dash} {line}\" d=\"{path}\"><title>{tip}</title></path>"
        ));
    }

    pub fn marker(&mut self, series: usize, x: f64, y: f64, r: f64, tip: &str) {
        let (colour, tip) = (series % 8, escape(tip));
        let tip = format!("<title>{tip}</title>");
        let class = format!("class=\"f{colour}\"");
        match series % 4 {
            0 => {
                let [x, y, r] = [x, y, r].map(number);
                self.put(format_args!(
                    "<circle {class} cx=\"{x}\" cy=\"{y}\" r=\"{r}\">{tip}</circle>"
                ));
            }
            1 => {
                let [x, y, side] = [x - 0.9 * r, y - 0.9 * r, 1.8 * r].map(number);
                self.put(format_args!(
                    "<rect {class} x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\">{tip}</rect>"
                ));
            }
            corners => {
                let upright = [
                    (x, y - 1.2 * r),
                    (x + 1.1 * r, y + 0.8 * r),
                    (x - 1.1 * r, y + 0.8 * r),
                ];
                let diamond = [
                    (x, y - 1.3 * r),
                    (x + 1.3 * r, y),
                    (x, y + 1.3 * r),
                    (x - 1.3 * r, y),
                ];
                let path = path(if corners == 2 { &upright } else { &diamond });
                self.put(format_args!("<path {class} d=\"{path}Z\">{tip}</path>"));
            }
        }
    }

    pub fn cell(&mut self, cell: &Cell, share: f64, text: Option<&str>, tip: &str) {
        let (colour, dark) = viridis(share);
        let tip = escape(tip);
        // a hair of paper between cells, unless that is all there is
        let gap = if cell.width > 4.0 { 1.0 } else { 0.0 };
        let [x, y, width, height] =
            [cell.x, cell.y, cell.width - gap, cell.height - 1.0].map(number);
        self.put(format_args!(
            "<g><title>{tip}</title><rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>"
        ));
        if let Some(text) = text {
            let class = if dark { "on-dark" } else { "on-light" };
            let (x, y) = (
                cell.x + (cell.width - gap) / 2.0,
                cell.y + cell.height / 2.0 + 3.0,
            );
            self.text(x, y, "middle", class, text);
        }
        self.put(format_args!("</g>"));
    }

    pub fn colour_bar(&mut self, frame: &Frame, scale: &Scale, height: f64) {
        const STEPS: usize = 48;
        let (x, step) = (frame.right() + 28.0, height / STEPS as f64);
        for i in 0..STEPS {
            let (colour, _) = viridis(1.0 - (i as f64 + 0.5) / STEPS as f64);
            // each reaches under the next, so that no seam shows
            let tall = if i + 1 < STEPS { step + 1.0 } else { step };
            let [x, y, tall] = [x, frame.top + step * i as f64, tall].map(number);
            self.put(format_args!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"14\" height=\"{tall}\" fill=\"{colour}\"/>"
            ));
        }
        for (value, _) in &scale.ticks {
            let y = frame.top + (1.0 - scale.at(*value)) * height;
            self.rule("axis", (x + 14.0, y), (x + 18.0, y));
            let close = scale.hi - scale.lo < 0.05;
            let text = if close {
                percent(*value)
            } else {
                format!("{:.0} %", 100.0 * value)
            };
            self.text(x + 22.0, y + 4.0, "start", "soft", &text);
        }
    }

    pub fn legend(&mut self, frame: &Frame, spectrum: &Spectrum) {
        let x = frame.right() + 24.0;
        let roles = shown(spectrum);
        for (i, role) in roles.iter().enumerate() {
            let y = frame.top + 8.0 + LEGEND_LINE * i as f64;
            let tip = format!("{}, {} modules", role.role, role.modules);
            self.line(i, &[(x, y), (x + 26.0, y)], &tip);
            self.marker(i, x + 13.0, y, 3.6, &tip);
            let zero = if role.stable_rank.is_none() {
                " (zero)"
            } else {
                ""
            };
            let name = shortened(&role.role) + zero;
            self.text(x + 34.0, y + 4.0, "start", "ink", &name);
        }
        let more = spectrum.roles.len() - roles.len();
        if more > 0 {
            let text = format!("{more} more are not drawn");
            self.text(x, frame.bottom() + 18.0, "start", "soft", &text);
        }
    }

    pub fn remark(&mut self, frame: &Frame, text: &str) {
        let (x, y) = (frame.x(0.5), frame.y(0.5));
        self.text(x, y, "middle", "soft", text);
    }

    pub fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}

/// Plain classes, no variables: programs for papers know no others. What does not know dark mode draws on white.
fn style() -> String {
    let mut css = String::from(
        ".plot text{font:12px system-ui,-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif}\
         .plot .head{font-size:14px;font-weight:600}.plot .on-dark,.plot .on-light{font-size:10px}\
         .plot .line{fill:none;stroke-width:1.8;stroke-linejoin:round}.plot .thin{stroke-width:1.1}.plot .band{fill-opacity:.06}.plot .edge{fill:none;stroke-width:.8;stroke-opacity:.55}\
         .plot .d1{stroke-dasharray:7 3}.plot .d2{stroke-dasharray:2 3}\
         .plot .on-dark{fill:#fff}.plot .on-light{fill:#111}",
    );
    let theme = |[paper, ink, soft, grid]: [&str; 4], colours: &[&str; 8]| {
        let mut css = format!(
            ".plot .paper{{fill:{paper}}}.plot .ink,.plot .head{{fill:{ink}}}.plot .soft{{fill:{soft}}}\
             .plot .grid{{stroke:{grid}}}.plot .axis{{stroke:{soft}}}"
        );
        for (i, colour) in colours.iter().enumerate() {
            let _ = write!(
                css,
                ".plot .s{i}{{stroke:{colour}}}.plot .f{i}{{fill:{colour}}}"
            );
        }
        css
    };
    css.push_str(&theme(
        ["#fff", "#1b1f24", "#59636e", "#e6e9ed"],
        &COLOURS[0],
    ));
    let dark = theme(["#14171c", "#e6e9ed", "#9aa4af", "#2a2f37"], &COLOURS[1]);
    let _ = write!(css, "@media (prefers-color-scheme:dark){{{dark}}}");
    css
}

/// The colour of a share, and whether it is a dark one.
fn viridis(share: f64) -> (String, bool) {
    let place = share.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let low = (place.floor() as usize).min(VIRIDIS.len() - 2);
    let (from, to, rest) = (VIRIDIS[low], VIRIDIS[low + 1], place - low as f64);
    let mix = |i: usize| f64::from(from[i]) + rest * (f64::from(to[i]) - f64::from(from[i]));
    let [r, g, b] = [mix(0), mix(1), mix(2)];
    let light = 0.299 * r + 0.587 * g + 0.114 * b;
    let [r, g, b] = [r, g, b].map(|c| c.round() as u8);
    (format!("#{r:02x}{g:02x}{b:02x}"), light < 130.0)
}

fn path(points: &[(f64, f64)]) -> String {
    let mut text = String::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        let [x, y] = [x, y].map(number);
        let _ = write!(text, "{}{x} {y}", if i == 0 { 'M' } else { 'L' });
    }
    text
}

/// 1, 2, 5, 10, 20 …: how many labels to step over.
fn round_up(count: usize) -> usize {
    let mut step = 1;
    loop {
        for m in [1, 2, 5] {
            if m * step >= count {
                return m * step;
            }
        }
        step *= 10;
    }
}

/// A coordinate, to a hundredth of a pixel.
pub fn number(x: f64) -> String {
    assert!(x.is_finite(), "scales answer within their frame");
    let text = format!("{x:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" {
        "0".into()
    } else {
        text.into()
    }
}

/// A name that leaves room for the plot; the whole one is in the tooltip.
pub fn shortened(name: &str) -> String {
    const CHARS_MAX: usize = 15;
    if name.chars().count() <= CHARS_MAX {
        return name.into();
    }
    let kept: String = name.chars().take(CHARS_MAX - 1).collect();
    kept + "…"
}

/// Text inside an element or an attribute. XML has no way to write most control characters.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
