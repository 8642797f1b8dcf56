//! Pictures of a spectrum: facts in, SVG out; pure. Each is a file of its own and fits into a page, light or dark.

mod drawing;
mod figure;
mod frame;
mod scale;

use drawing::{Cell, Drawing, shortened};
use frame::{Columns, Frame, LEFT, LEGEND_LINE, WIDTH};
use scale::{Scale, range};

use crate::spectrum::{ModuleFacts, RoleFacts, Spectrum, Spread};

pub use drawing::escape;
pub use figure::{figure, percent};

/// More lines than this are told apart by nobody; names of strangers could be any number.
const ROLES_MAX: usize = 24;

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

#[cfg(test)]
mod tests {
    use super::frame::TOP;
    use super::*;
    use crate::page::MARK;
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
