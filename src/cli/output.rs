//! Tables on standard output.

/// Names come from strangers: what would steer a terminal is not passed on.
pub fn plain(text: &str) -> String {
    // those that turn the direction of what follows, too
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.replace(
        |c: char| c.is_control() && c != '\n' || turns(c),
        "\u{fffd}",
    )
}

/// Rows of cells under a header: columns of numbers are aligned to the right, columns of words to the left.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        Self {
            rows: vec![header.into_iter().map(Into::into).collect()],
        }
    }

    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let plain = cells.into_iter().map(|cell| plain(&cell.into()));
        self.rows.push(plain.collect());
    }

    /// The table as text, ending in a newline.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let numeric = |column: usize| {
            let cells = self.rows.iter().skip(1).filter_map(|row| row.get(column));
            let mut starts = cells.filter_map(|cell| cell.chars().next());
            column > 0 && starts.all(|c| c.is_ascii_digit() || c == '–')
        };
        let numeric: Vec<bool> = (0..columns).map(numeric).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let padding = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
                let gap = if column == 0 { "" } else { "  " };
                if numeric[column] {
                    line.push_str(&format!("{gap}{padding}{cell}"));
                } else {
                    line.push_str(&format!("{gap}{cell}{padding}"));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_named_does_not_steer_the_terminal() {
        let name = "model.\u{1b}]0;title\u{7}\u{9b}2J";
        assert_eq!(plain(name), "model.\u{fffd}]0;title\u{fffd}\u{fffd}2J");
        assert_eq!(plain("two\nlines – ∅"), "two\nlines – ∅");
    }
}
