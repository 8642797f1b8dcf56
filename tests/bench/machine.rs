//! Whether the machine is fit for a measurement.

/// A line that nobody overlooks.
pub fn loudly(message: &str) {
    eprintln!("!!! {message}");
}

/// How many threads wanted to run, on average over the last minute, where the system says; and loudly, if too many.
pub fn load(threads: usize) -> Option<String> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    if load > BUSY * threads as f64 {
        loudly(&format!(
            "THE MACHINE IS BUSY (load {load}): threads that wait for each other suffer most; \
             no ratio of this run is worth quoting"
        ));
    }
    Some(format!("load average at the start: {load}"))
}

/// More than this share of our threads at work for somebody else makes a run worthless.
const BUSY: f64 = 0.25;
