//! Pictures of a spectrum: facts in, SVG out; pure. Each is a file of its own and fits into a page, light or dark.

use std::fmt::Write as _;

use crate::card::thousands;
use crate::spectrum::{ModuleFacts, RoleFacts, Spectrum, Spread};

/// In every picture and page of ours, and in no other: a file without it was written by somebody and is left alone.
pub const MARK: &str = "<!-- drawn by svdhub inspect -->";

/// More lines than this are told apart by nobody; names of strangers could be any number.
const ROLES_MAX: usize = 24;

const LEFT: f64 = 112.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
/// Room for the legend.
const RIGHT: f64 = 168.0;
const WIDTH: f64 = 640.0;
const LEGEND_LINE: f64 = 21.0;

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

/// σ_k/σ₁ against k/q: a line per role through the medians of its modules, in a band from the least to the greatest.
pub fn curves(spectrum: &Spectrum) -> String {
    let roles = shown(spectrum);
    let height = f64::max(340.0, LEGEND_LINE * roles.len() as f64);
    let frame = Frame::new(WIDTH, height);
    let desc: String = roles.iter().map(|r| curve_in_words(r) + ". ").collect();
    let mut drawing = Drawing::new(
        "curves",
        "Singular values relative to the largest: σₖ/σ₁ against k/q",
        &desc,
        &frame,
    );
    let positive = roles.iter().flat_map(|r| &r.curve.min);
    let least = positive.filter(|&&s| s > 0.0).copied().fold(0.5, f64::min);
    let (x, y) = (Scale::linear(0.0, 1.0), Scale::log(least, 1.0));
    drawing.x_axis(&frame, &x, "k/q: position among the kept values");
    drawing.y_axis(&frame, &y, "σₖ/σ₁");
    let at = |share: f64, sigma: f64| (frame.x(x.at(share)), frame.y(y.at(sigma)));
    for (i, role) in roles.iter().enumerate().filter(|(_, r)| r.modules > 1) {
        let c = &role.curve;
        let side = |values: &[f64]| -> Vec<(f64, f64)> {
            c.share
                .iter()
                .zip(values)
                .map(|(&k, &s)| at(k, s))
                .collect()
        };
        drawing.band(i, &side(&c.max), &side(&c.min));
    }
    for (i, role) in roles.iter().enumerate() {
        let c = &role.curve;
        let points: Vec<_> = c
            .share
            .iter()
            .zip(&c.median)
            .map(|(&k, &s)| at(k, s))
            .collect();
        drawing.line(i, &points, &curve_in_words(role));
        // a marker now and then, each role's at its own places
        let place = |share: f64| (6.0 * share + i as f64 / roles.len() as f64).floor();
        let mut last = f64::NAN;
        for (&share, &(x, y)) in c.share.iter().zip(&points) {
            if place(share) != last && (points.len() == 1 || !last.is_nan()) {
                drawing.marker(i, x, y, 3.4, &curve_in_words(role));
            }
            last = place(share);
        }
    }
    if roles.iter().all(|role| role.curve.share.is_empty()) {
        drawing.remark(&frame, "every singular value is zero");
    }
    drawing.legend(&frame, spectrum);
    drawing.finish()
}

/// Captured energy: a row per role, a column per layer.
pub fn energy(spectrum: &Spectrum) -> String {
    const ROW: f64 = 27.0;
    let roles = shown(spectrum);
    let columns = Columns::of(spectrum);
    let frame = Frame::new(columns.width(), ROW * roles.len() as f64);
    let desc: String = roles
        .iter()
        .map(|r| {
            format!(
                "{}: {}. ",
                r.role,
                spread_in_words(&r.captured_energy, percent)
            )
        })
        .collect();
    let title = "Captured energy Σσ²/‖M‖² in percent, by layer and role";
    // a single row leaves too little height for the scale beside it
    let bar = f64::max(frame.height, 108.0);
    let mut drawing = Drawing::sized("energy", title, &desc, &frame, bar);
    let (lo, hi) = range(
        spectrum
            .modules
            .iter()
            .map(|m| m.captured_energy.clamp(0.0, 1.0)),
    );
    let scale = match hi - lo {
        flat if flat < 1e-6 => Scale::linear((lo - 0.05).max(0.0), (hi + 0.05).min(1.0)),
        _ => Scale::linear(lo, hi),
    };
    drawing.layer_axis(&frame, &columns);
    for (row, role) in roles.iter().enumerate() {
        let y = frame.top + ROW * row as f64;
        drawing.text(
            LEFT - 8.0,
            y + ROW / 2.0 + 4.0,
            "end",
            "ink",
            &shortened(&role.role),
        );
        for module in spectrum.modules.iter().filter(|m| m.role == role.role) {
            let column = columns.left(module);
            let share = scale.at(module.captured_energy);
            let cell = Cell {
                x: frame.left + column,
                y,
                width: columns.step_of(module),
                height: ROW,
            };
            let number = (cell.width >= 17.0)
                .then(|| format!("{:.0}", 100.0 * module.captured_energy.clamp(0.0, 1.0)));
            let tip = format!(
                "{}: {} of the energy in {} of {} triplets",
                module.name,
                percent(module.captured_energy),
                module.q,
                module.shape[0].min(module.shape[1])
            );
            drawing.cell(&cell, share, number.as_deref(), &tip);
        }
    }
    drawing.colour_bar(&frame, &scale, bar);
    drawing.finish()
}

/// ‖M‖²/σ₁² by layer, a line per role.
pub fn stable_rank(spectrum: &Spectrum) -> String {
    let roles = shown(spectrum);
    let columns = Columns::of(spectrum);
    let height = f64::max(300.0, LEGEND_LINE * roles.len() as f64);
    let frame = Frame::new(columns.width(), height);
    let words = |r: &RoleFacts| match &r.stable_rank {
        Some(spread) => format!("{}: {}", r.role, spread_in_words(spread, figure)),
        None => format!("{}: zero matrices only", r.role),
    };
    let desc: String = roles.iter().map(|r| words(r) + ". ").collect();
    let mut drawing = Drawing::new(
        "stable-rank",
        "Stable rank ‖M‖²/σ₁² by layer",
        &desc,
        &frame,
    );
    let (lo, hi) = range(spectrum.modules.iter().filter_map(|m| m.stable_rank));
    let y = if lo > 0.0 && hi / lo > 20.0 {
        Scale::log(lo, hi)
    } else {
        // no matrix but zero has less than 1
        Scale::rounded(0.0, hi.max(1.0))
    };
    drawing.y_axis(&frame, &y, "stable rank");
    drawing.layer_axis(&frame, &columns);
    let radius = (columns.step / 5.0).clamp(1.4, 3.6);
    for (i, role) in roles.iter().enumerate() {
        let points: Vec<(&ModuleFacts, f64, f64)> = spectrum
            .modules
            .iter()
            .filter(|m| m.role == role.role)
            .filter_map(|m| {
                let x = frame.left + columns.left(m) + columns.step_of(m) / 2.0;
                Some((m, x, frame.y(y.at(m.stable_rank?))))
            })
            .collect();
        let inside = points.iter().filter(|(m, ..)| m.layer.is_some());
        let line: Vec<(f64, f64)> = inside.map(|&(_, x, y)| (x, y)).collect();
        drawing.line(i, &line, &words(role));
        for (module, x, y) in points {
            let value = module.stable_rank.map_or_else(String::new, figure);
            let tip = format!("{}: stable rank {value}", module.name);
            let radius = if module.layer.is_some() { radius } else { 3.6 };
            drawing.marker(i, x, y, radius, &tip);
        }
    }
    if roles.iter().all(|role| role.stable_rank.is_none()) {
        drawing.remark(&frame, "every matrix is zero");
    }
    drawing.legend(&frame, spectrum);
    drawing.finish()
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A number in three digits, as a person would write it.
pub fn figure(x: f64) -> String {
    let size = x.abs();
    let digits = match size {
        0.0 => return "0".into(),
        _ if !(1e-3..1e7).contains(&size) => {
            let exponent = size.log10().floor();
            return format!(
                "{:.1}·10{}",
                x / 10f64.powf(exponent),
                raised(exponent as i32)
            );
        }
        _ if size >= 999.5 => {
            let sign = if x < 0.0 { "−" } else { "" };
            return format!("{sign}{}", thousands(size.round() as u64));
        }
        _ => (2 - size.log10().floor() as i32).clamp(0, 5) as usize,
    };
    format!("{x:.digits$}")
}

fn raised(exponent: i32) -> String {
    let digit = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        // the other digits follow each other
        c => char::from_u32('⁰' as u32 + c.to_digit(10).unwrap_or(0)).unwrap_or(c),
    };
    exponent.to_string().chars().map(digit).collect()
}

fn shown(spectrum: &Spectrum) -> &[RoleFacts] {
    &spectrum.roles[..spectrum.roles.len().min(ROLES_MAX)]
}

fn curve_in_words(role: &RoleFacts) -> String {
    let many = if role.modules == 1 { "" } else { "s" };
    match role.curve.median.last() {
        Some(&end) => format!(
            "{}, {} module{many}: the last kept value is {} of σ₁ in the median",
            role.role,
            role.modules,
            figure(end)
        ),
        None => format!("{}, {} module{many}: zero", role.role, role.modules),
    }
}

fn spread_in_words(spread: &Spread, unit: fn(f64) -> String) -> String {
    format!(
        "{} to {}, median {}",
        unit(spread.min),
        unit(spread.max),
        unit(spread.median)
    )
}

/// The least and the greatest; 0 and 0 of nothing.
fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let lo = values.clone().fold(f64::INFINITY, f64::min);
    let hi = values.fold(f64::NEG_INFINITY, f64::max);
    if lo <= hi { (lo, hi) } else { (0.0, 0.0) }
}

/// Numbers beyond this are drawn at the edge: a stranger's report may hold any.
const EXTREME: f64 = 1e15;

/// A scale from numbers to 0 … 1, with the values that are labelled on it.
struct Scale {
    lo: f64,
    hi: f64,
    log: bool,
    ticks: Vec<(f64, String)>,
}

impl Scale {
    /// From `lo` to `hi` exactly.
    fn linear(lo: f64, hi: f64) -> Self {
        let mut scale = Self::rounded(lo, hi);
        (scale.lo, scale.hi) = (lo, hi);
        scale
            .ticks
            .retain(|(v, _)| (lo - 1e-9..=hi + 1e-9).contains(v));
        scale
    }

    /// From `lo` to `hi`, widened to round numbers.
    fn rounded(lo: f64, hi: f64) -> Self {
        let (lo, hi) = (lo.clamp(-EXTREME, EXTREME), hi.clamp(-EXTREME, EXTREME));
        // all the same, or nearly: any range around it will do
        let hi = hi.max(lo + lo.abs() * 1e-6).max(lo + 1e-6);
        let rough = (hi - lo) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0]
            .into_iter()
            .find(|m| m * power >= rough * 0.999);
        let step = step.unwrap_or(10.0) * power;
        let (first, last) = ((lo / step + 1e-6).floor(), (hi / step - 1e-6).ceil());
        let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let label = |v: f64| {
            if hi.abs() >= 1e6 {
                figure(v)
            } else if step >= 1.0 {
                thousands(v.max(0.0).round() as u64)
            } else {
                format!("{v:.digits$}")
            }
        };
        let ticks = (0..=(last - first) as usize).map(|i| (first + i as f64) * step);
        Self {
            lo: first * step,
            hi: last * step,
            log: false,
            ticks: ticks.map(|v| (v, label(v))).collect(),
        }
    }

    /// From `lo` to `hi`, both positive, widened to their first digits.
    fn log(lo: f64, hi: f64) -> Self {
        let edge = |v: f64, round: fn(f64) -> f64| {
            let v = v.clamp(1.0 / EXTREME, EXTREME);
            let power = 10f64.powf(v.log10().floor());
            round(v / power) * power
        };
        // a hair inside, so that a round number stays what it is
        let hi = edge(hi * (1.0 - 1e-9), f64::ceil);
        let lo = edge(lo * (1.0 + 1e-9), f64::floor).min(hi / 2.0);
        let (first, last) = (lo.log10().floor() as i32, hi.log10().ceil() as i32);
        // whole powers of ten, every second or third of them where there are many; between those what room there is
        let every = (last - first) / 8 + 1;
        let powers = (first..=last).filter(|e| e % every == 0);
        let marks = |digits: &[i32]| -> Vec<(i32, i32)> {
            let all = powers
                .clone()
                .flat_map(|e| digits.iter().map(move |&m| (m, e)));
            let inside = |&(m, e): &(i32, i32)| {
                let v = f64::from(m) * 10f64.powi(e);
                (lo * (1.0 - 1e-9)..=hi * (1.0 + 1e-9)).contains(&v)
            };
            all.filter(inside).collect()
        };
        let choices = [&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[1, 2, 5], &[1]].map(marks);
        let [.., sparse] = &choices;
        let kept = choices
            .iter()
            .find(|marks| marks.len() <= 9)
            .unwrap_or(sparse);
        let label = |&(m, e): &(i32, i32)| {
            let v = f64::from(m) * 10f64.powi(e);
            let text = match e {
                -2..=4 => figure_of_tick(v),
                _ if m == 1 => format!("10{}", raised(e)),
                _ => format!("{m}·10{}", raised(e)),
            };
            (v, text)
        };
        Self {
            lo,
            hi,
            log: true,
            ticks: kept.iter().map(label).collect(),
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = if !self.log {
            (value - self.lo) / (self.hi - self.lo)
        } else if value > 0.0 {
            (value / self.lo).ln() / (self.hi / self.lo).ln()
        } else {
            0.0
        };
        if share.is_finite() {
            share.clamp(0.0, 1.0)
        } else {
            0.0
        }
    }
}

/// 0.05, 2, 5,000: a tick's value without needless zeros.
fn figure_of_tick(v: f64) -> String {
    if v >= 1.0 {
        thousands(v.round() as u64)
    } else {
        let text = format!("{v:.3}");
        text.trim_end_matches('0').to_string()
    }
}

/// Where a plot's inside lies.
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Frame {
    fn new(width: f64, height: f64) -> Self {
        Self {
            left: LEFT,
            top: TOP,
            width,
            height,
        }
    }

    fn x(&self, share: f64) -> f64 {
        self.left + share * self.width
    }

    /// Upwards, as in mathematics.
    fn y(&self, share: f64) -> f64 {
        self.top + (1.0 - share) * self.height
    }

    fn right(&self) -> f64 {
        self.left + self.width
    }

    fn bottom(&self) -> f64 {
        self.top + self.height
    }
}

/// A column per layer that is there; what is in no layer (the head) gets one at the end.
struct Columns {
    layers: Vec<u32>,
    step: f64,
    outside: Option<&'static str>,
}

const GAP: f64 = 12.0;

impl Columns {
    fn of(spectrum: &Spectrum) -> Self {
        let mut layers: Vec<u32> = spectrum.modules.iter().filter_map(|m| m.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let mut apart = spectrum
            .modules
            .iter()
            .filter(|m| m.layer.is_none())
            .peekable();
        let outside = apart.peek().is_some().then_some(());
        let outside = outside.map(|()| {
            if apart.all(|m| m.role == "lm_head") {
                "head"
            } else {
                "other"
            }
        });
        let room = WIDTH - if outside.is_some() { 40.0 } else { 0.0 };
        let step = (room / layers.len().max(1) as f64).min(90.0);
        Self {
            layers,
            step,
            outside,
        }
    }

    fn outside_step(&self) -> f64 {
        self.step.clamp(24.0, 60.0)
    }

    /// Of all layers.
    fn inner_width(&self) -> f64 {
        self.step * self.layers.len() as f64
    }

    fn width(&self) -> f64 {
        let inner = self.inner_width();
        match self.outside {
            Some(_) if inner > 0.0 => inner + GAP + self.outside_step(),
            Some(_) => self.outside_step(),
            None => inner,
        }
    }

    /// The left edge of a module's column, from that of the frame.
    fn left(&self, module: &ModuleFacts) -> f64 {
        match module.layer {
            Some(layer) => self.step * self.layers.partition_point(|&l| l < layer) as f64,
            None => self.width() - self.outside_step(),
        }
    }

    fn step_of(&self, module: &ModuleFacts) -> f64 {
        match module.layer {
            Some(_) => self.step,
            None => self.outside_step(),
        }
    }
}

struct Cell {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

/// An SVG as it grows.
struct Drawing {
    text: String,
}

impl Drawing {
    fn new(id: &str, title: &str, desc: &str, frame: &Frame) -> Self {
        Self::sized(id, title, desc, frame, frame.height)
    }

    /// `inside` is the height of whatever is highest between title and axis.
    fn sized(id: &str, title: &str, desc: &str, frame: &Frame, inside: f64) -> Self {
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

    fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let ([x, y], text) = ([x, y].map(number), escape(text));
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        ));
    }

    fn rule(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(number);
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"
        ));
    }

    fn x_axis(&mut self, frame: &Frame, scale: &Scale, label: &str) {
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

    fn y_axis(&mut self, frame: &Frame, scale: &Scale, label: &str) {
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

    fn layer_axis(&mut self, frame: &Frame, columns: &Columns) {
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
    fn band(&mut self, series: usize, upper: &[(f64, f64)], lower: &[(f64, f64)]) {
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

    fn line(&mut self, series: usize, points: &[(f64, f64)], tip: &str) {
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

    fn marker(&mut self, series: usize, x: f64, y: f64, r: f64, tip: &str) {
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

    fn cell(&mut self, cell: &Cell, share: f64, text: Option<&str>, tip: &str) {
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

    fn colour_bar(&mut self, frame: &Frame, scale: &Scale, height: f64) {
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

    fn legend(&mut self, frame: &Frame, spectrum: &Spectrum) {
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

    fn remark(&mut self, frame: &Frame, text: &str) {
        let (x, y) = (frame.x(0.5), frame.y(0.5));
        self.text(x, y, "middle", "soft", text);
    }

    fn finish(mut self) -> String {
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
fn number(x: f64) -> String {
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
fn shortened(name: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spectrum::tests::spectrum;

    const HOSTILE: &str = "layers.0.<script>alert(\"1\")</script>&amp;'\u{1b}[2J\u{fffe}";

    fn all(of: &Spectrum) -> [String; 3] {
        [curves(of), energy(of), stable_rank(of)]
    }

    /// Every number of a picture lies inside it.
    fn assert_sound(svg: &str) {
        let document = roxmltree::Document::parse(svg).unwrap_or_else(|e| panic!("{e} in {svg}"));
        let root = document.root_element();
        assert!(root.has_tag_name(("http://www.w3.org/2000/svg", "svg")) && svg.contains(MARK));
        let side = |name| -> f64 {
            root.attribute(name)
                .expect("a side")
                .parse()
                .expect("a number")
        };
        let (width, height) = (side("width"), side("height"));
        for named in ["title", "desc"] {
            let node = root.children().find(|n| n.has_tag_name(named));
            assert!(
                node.and_then(|n| n.text())
                    .is_some_and(|text| !text.is_empty()),
                "{named}"
            );
        }
        let within = |text: &str, most: f64| {
            let x: f64 = text.parse().unwrap_or_else(|_| panic!("{text} in {svg}"));
            assert!(
                x.is_finite() && (0.0..=most).contains(&x),
                "{text} is outside of {svg}"
            );
        };
        for node in document.descendants() {
            for attribute in node.attributes() {
                let value = attribute.value();
                assert!(!value.contains("NaN") && !value.contains("inf"), "{value}");
                match attribute.name() {
                    "x" | "x1" | "x2" | "cx" | "width" => within(value, width),
                    "y" | "y1" | "y2" | "cy" | "height" | "r" => within(value, height),
                    "d" => {
                        for point in value.split(['M', 'L', 'Z']).filter(|p| !p.is_empty()) {
                            let (x, y) = point.split_once(' ').expect("a point");
                            within(x, width);
                            within(y, height);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn every_picture_is_well_formed_and_inside_its_frame() {
        let deep: Vec<String> = (0..300)
            .flat_map(|i| {
                ["self_attn.q_proj", "mlp.up_proj"].map(|m| format!("model.layers.{i}.{m}"))
            })
            .chain(["lm_head".to_string()])
            .collect();
        let deep: Vec<(&str, &[f32], &[f32])> = deep
            .iter()
            .map(|name| (name.as_str(), &[9.0, 3.0, 1.0][..], &[0.5][..]))
            .collect();
        let strange: Vec<String> = (0..40)
            .map(|i| format!("a.{}.role{i}", u32::MAX - i))
            .collect();
        let strange: Vec<(&str, &[f32], &[f32])> = strange
            .iter()
            .map(|name| (name.as_str(), &[1e30, 1e-30][..], &[][..]))
            .collect();
        let mut forged = spectrum(&[
            ("layers.0.q_proj", &[2.0, 1.0], &[]),
            ("layers.1.q_proj", &[3.0, 1.0], &[]),
        ]);
        for module in &mut forged.modules {
            (module.captured_energy, module.stable_rank) = (-1e308, Some(1e308));
        }
        forged.roles[0].curve.min = vec![-1e308, 1e308];
        forged.roles[0].stable_rank = Some(Spread {
            min: -1e308,
            median: 0.0,
            max: 1e308,
        });
        for of in [
            spectrum(&deep),
            spectrum(&strange),
            forged,
            spectrum(&[("layers.3.q_proj", &[2.0, 1.0], &[1.0])]),
            spectrum(&[("lm_head", &[2.0], &[])]),
            spectrum(&[
                ("layers.0.q_proj", &[0.0, 0.0], &[]),
                ("layers.1.q_proj", &[0.0], &[]),
            ]),
            spectrum(&[
                ("layers.0.q_proj", &[2.0, 0.0], &[]),
                ("layers.0.k_proj", &[0.0], &[]),
            ]),
            spectrum(&[(HOSTILE, &[2.0, 1.0], &[1.0]), ("", &[1.0], &[])]),
        ] {
            all(&of).iter().for_each(|svg| assert_sound(svg));
        }
    }

    #[test]
    fn a_strangers_name_stays_text() {
        let of = spectrum(&[(HOSTILE, &[2.0, 1.0], &[1.0])]);
        for svg in all(&of) {
            let document = roxmltree::Document::parse(&svg).expect("well-formed");
            assert!(!document.descendants().any(|n| n.has_tag_name("script")));
            let mut texts = document.descendants().filter_map(|n| n.text());
            assert!(
                texts.any(|t| t.contains("</script>&amp;'\u{fffd}[2J\u{fffd}")),
                "{svg}"
            );
        }
    }

    /// The points of the path with these classes.
    fn points(svg: &str, class: &str) -> Vec<(f64, f64)> {
        let document = roxmltree::Document::parse(svg).expect("well-formed");
        let path = document
            .descendants()
            .find(|n| n.attribute("class") == Some(class));
        let d = path
            .and_then(|p| p.attribute("d"))
            .expect("a path")
            .to_string();
        let points = d.split(['M', 'L']).filter(|p| !p.is_empty());
        let parse = |p: &str| {
            let (x, y) = p.split_once(' ').expect("a point");
            (x.parse().expect("x"), y.parse().expect("y"))
        };
        points.map(parse).collect()
    }

    #[test]
    fn lines_go_where_the_numbers_are() {
        // from 1 at k/q = 1/4 in equal steps on the log scale to 0.001, its lower end
        let of = spectrum(&[("layers.0.q_proj", &[1.0, 0.1, 0.01, 0.001], &[])]);
        let expected = [0.25, 0.5, 0.75, 1.0].map(|share| LEFT + share * WIDTH);
        for (i, (x, y)) in points(&curves(&of), "s0 d0 line").into_iter().enumerate() {
            assert!((x - expected[i]).abs() < 0.01);
            assert!((y - (TOP + 340.0 * i as f64 / 3.0)).abs() < 0.01, "{y}");
        }
        // stable ranks 1 and 4 on a scale from 0 to 4
        let of = spectrum(&[
            ("layers.0.q_proj", &[2.0], &[]),
            ("layers.7.q_proj", &[1.0; 4], &[]),
        ]);
        let line = points(&stable_rank(&of), "s0 d0 line");
        assert_eq!(
            line.iter().map(|p| p.1).collect::<Vec<_>>(),
            [TOP + 225.0, TOP]
        );
        assert_eq!(
            line[1].0 - line[0].0,
            90.0,
            "layers that are not there take no room"
        );
    }

    #[test]
    fn colours_follow_the_energy() {
        let of = spectrum(&[
            ("layers.0.q_proj", &[1.0], &[3.0]),
            ("layers.1.q_proj", &[1.0], &[2.0]),
            ("layers.2.q_proj", &[3.0], &[1.0]),
        ]);
        let svg = energy(&of);
        let document = roxmltree::Document::parse(&svg).expect("well-formed");
        let cells = document.descendants().filter(|n| n.has_tag_name("g"));
        let fills: Vec<&str> = cells
            .filter_map(|g| {
                g.children()
                    .find(|n| n.has_tag_name("rect"))?
                    .attribute("fill")
            })
            .collect();
        assert_eq!((fills[0], fills[2]), ("#440154", "#fde725"));
        assert_ne!(fills[1], fills[0]);
        assert!(svg.contains("layers.2.q_proj: 90.0 % of the energy in 1 of 2 triplets"));
    }

    #[test]
    fn ticks_are_round_and_numbers_short() {
        let labels = |s: Scale| {
            s.ticks
                .into_iter()
                .map(|(_, t)| t)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(labels(Scale::linear(0.0, 1.0)), "0.0 0.2 0.4 0.6 0.8 1.0");
        assert_eq!(labels(Scale::rounded(0.0, 171.0)), "0 50 100 150 200");
        assert_eq!(labels(Scale::log(0.095, 1.0)), "0.1 0.2 0.5 1");
        assert_eq!(
            labels(Scale::log(0.35, 1.0)),
            "0.3 0.4 0.5 0.6 0.7 0.8 0.9 1"
        );
        assert_eq!(labels(Scale::log(1.0, 1.0)), "0.5 0.6 0.7 0.8 0.9 1");
        assert_eq!(
            labels(Scale::log(1.4e-6, 1.0)),
            "10⁻⁶ 10⁻⁵ 10⁻⁴ 10⁻³ 0.01 0.1 1"
        );
        let of = [
            0.0, 0.123_456, 4.556, 38.46, 999.7, 744_142.0, 1.23e9, 4.2e-7,
        ]
        .map(figure);
        assert_eq!(
            of,
            [
                "0",
                "0.123",
                "4.56",
                "38.5",
                "1,000",
                "744,142",
                "1.2·10⁹",
                "4.2·10⁻⁷"
            ]
        );
    }
}
