//! Tables on standard output.

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
        self.rows.push(cells.into_iter().map(Into::into).collect());
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
