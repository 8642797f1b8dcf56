//! Where things lie in a picture, in pixels.

use crate::spectrum::{ModuleFacts, Spectrum};

pub const LEFT: f64 = 112.0;
pub const TOP: f64 = 44.0;
pub const BOTTOM: f64 = 52.0;
/// Room for the legend.
pub const RIGHT: f64 = 168.0;
pub const WIDTH: f64 = 640.0;
pub const LEGEND_LINE: f64 = 21.0;

/// Where a plot's inside lies.
pub struct Frame {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

impl Frame {
    pub fn new(width: f64, height: f64) -> Self {
        Self {
            left: LEFT,
            top: TOP,
            width,
            height,
        }
    }

    pub fn x(&self, share: f64) -> f64 {
        self.left + share * self.width
    }

    /// Upwards, as in mathematics.
    pub fn y(&self, share: f64) -> f64 {
        self.top + (1.0 - share) * self.height
    }

    pub fn right(&self) -> f64 {
        self.left + self.width
    }

    pub fn bottom(&self) -> f64 {
        self.top + self.height
    }
}

/// A column per layer that is there; what is in no layer (the head) gets one at the end.
pub struct Columns {
    pub layers: Vec<u32>,
    pub step: f64,
    pub outside: Option<&'static str>,
}

pub const GAP: f64 = 12.0;

impl Columns {
    pub fn of(spectrum: &Spectrum) -> Self {
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

    pub fn outside_step(&self) -> f64 {
        self.step.clamp(24.0, 60.0)
    }

    /// Of all layers.
    pub fn inner_width(&self) -> f64 {
        self.step * self.layers.len() as f64
    }

    pub fn width(&self) -> f64 {
        let inner = self.inner_width();
        match self.outside {
            Some(_) if inner > 0.0 => inner + GAP + self.outside_step(),
            Some(_) => self.outside_step(),
            None => inner,
        }
    }

    /// The left edge of a module's column, from that of the frame.
    pub fn left(&self, module: &ModuleFacts) -> f64 {
        match module.layer {
            Some(layer) => self.step * self.layers.partition_point(|&l| l < layer) as f64,
            None => self.width() - self.outside_step(),
        }
    }

    pub fn step_of(&self, module: &ModuleFacts) -> f64 {
        match module.layer {
            Some(_) => self.step,
            None => self.outside_step(),
        }
    }
}
