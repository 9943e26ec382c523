//! Values in as few digits as they are worth: three that count, and thousands apart.

/// A value: `0.0123`, `4.56`, `78.9`, `123`, `45,678`.
pub(crate) fn number(value: f64) -> String {
    if !value.is_finite() {
        return "?".to_owned();
    }
    let size = value.abs();
    // What would be rounded up to more digits is counted as if it had them.
    let decimals = if size == 0.0 || size >= 99.95 {
        0
    } else if size >= 9.995 {
        1
    } else if size >= 0.9995 {
        2
    } else if size >= 0.0995 {
        3
    } else {
        4
    };
    apart(&format!("{value:.decimals$}"))
}

/// A value with its unit.
pub(crate) fn quantity(value: f64, unit: &str) -> String {
    match unit {
        "" => number(value),
        unit => format!("{} {unit}", number(value)),
    }
}

/// A comma before every three digits of the whole part.
fn apart(text: &str) -> String {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    let (whole, fraction) = digits.find('.').map_or((digits, ""), |at| digits.split_at(at));
    let mut apart = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            apart.push(',');
        }
        apart.push(digit);
    }
    format!("{sign}{apart}{fraction}")
}

#[cfg(test)]
mod tests {
    use super::{number, quantity};

    #[test]
    fn three_digits_count() {
        let shown = |value| number(value);
        assert_eq!(shown(0.0), "0");
        assert_eq!(shown(0.01234), "0.0123");
        assert_eq!(shown(0.1234), "0.123");
        assert_eq!(shown(1.0), "1.00");
        assert_eq!(shown(9.999), "10.0");
        assert_eq!(shown(12.34), "12.3");
        assert_eq!(shown(123.4), "123");
        assert_eq!(shown(138_648.4), "138,648");
        assert_eq!(shown(-1234.0), "-1,234");
        assert_eq!(shown(f64::NAN), "?");
    }

    #[test]
    fn counts_have_no_unit() {
        assert_eq!(quantity(5.0, ""), "5.00");
        assert_eq!(quantity(2.5, "ms"), "2.50 ms");
    }
}
