//! A table of a configuration file, read key by key: what a key has is checked and turned into a value, where it stands is kept for later errors, and a key that
//! nobody asks for is wrong. Nothing ends the reading: what is wrong is told, and counts as not said.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ops::{Range, RangeInclusive},
    path::Path,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Naming, source::Problem};
use crate::{
    args::units::parse_mib,
    specs::{parse_bytes, parse_milliseconds},
    uploads,
};

/// How alike two keys have to be for one to be proposed for the other (Jaro-Winkler, 0 to 1): as clap has it for options.
const ALIKE: f64 = 0.7;

/// What all tables of a file are read with.
pub(super) struct Reading<'n> {
    naming: &'n Naming,
    problems: RefCell<Vec<Problem>>,
    places: RefCell<BTreeMap<String, Range<usize>>>,
}

impl<'n> Reading<'n> {
    pub(super) fn new(naming: &'n Naming) -> Self {
        Self {
            naming,
            problems: RefCell::default(),
            places: RefCell::default(),
        }
    }

    /// What was wrong, and where each field is said.
    pub(super) fn done(self) -> (Vec<Problem>, BTreeMap<String, Range<usize>>) {
        (self.problems.into_inner(), self.places.into_inner())
    }

    pub(super) fn wrong(&self, span: Range<usize>, message: impl Into<String>) {
        let message = message.into();
        self.problems.borrow_mut().push(Problem { span, message });
    }
}

/// A table.
pub(super) struct Section<'a> {
    reading: &'a Reading<'a>,
    /// None: there is nothing in it.
    table: Option<&'a DeTable<'a>>,
    /// Its header, or itself.
    span: Range<usize>,
    /// The protocol's name for what it is about; empty for the guest.
    field: String,
    /// Every key that was asked for.
    known: RefCell<Vec<&'static str>>,
}

/// A value without parts, or the name of what is something else.
enum Scalar<'a> {
    Text(&'a str),
    Number(i128),
    Fraction(f64),
    Flag(bool),
    Other(&'static str),
}

impl<'a> Scalar<'a> {
    fn of(value: &'a DeValue<'a>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text),
            // One past all bounds is past those of any field.
            DeValue::Integer(integer) => Self::Number(match i128::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(number) => number,
                Err(_) if integer.as_str().starts_with('-') => i128::MIN,
                Err(_) => i128::MAX,
            }),
            DeValue::Float(float) => float.as_str().parse().map_or(Self::Other("a float"), Self::Fraction),
            DeValue::Boolean(flag) => Self::Flag(*flag),
            DeValue::Datetime(_) => Self::Other("a date"),
            DeValue::Array(_) => Self::Other("an array"),
            DeValue::Table(_) => Self::Other("a table"),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Number(_) => "a number",
            Self::Fraction(_) => "a number with a fraction",
            Self::Flag(_) => "true or false",
            Self::Other(name) => name,
        }
    }

    /// What is said of a value that is not what it has to be.
    fn instead(&self, key: &str, of: &str) -> String {
        format!("'{key}' needs {of}, and this is {}", self.name())
    }
}

impl<'a> Section<'a> {
    /// The table of the guest itself.
    pub(super) fn guest(reading: &'a Reading<'a>, table: &'a DeTable<'a>) -> Self {
        Self {
            reading,
            table: Some(table),
            span: 0..0,
            field: String::new(),
            known: RefCell::default(),
        }
    }

    /// Tells what is wrong with all of the table.
    pub(super) fn wrong(&self, message: impl Into<String>) {
        self.reading.wrong(self.span.clone(), message);
    }

    /// Whether a key is not there at all.
    pub(super) fn is_empty_of(&self, key: &str) -> bool {
        self.table.is_none_or(|table| !table.contains_key(key))
    }

    /// What `read` makes of a key that has to be there.
    pub(super) fn needed<T>(&self, key: &'static str, read: impl FnOnce(&'static str) -> Option<T>) -> Option<T> {
        if self.is_empty_of(key) {
            self.wrong(format!("'{key}' is missing here"));
        }
        read(key)
    }

    fn field(&self, part: &str) -> String {
        match (self.field.as_str(), part) {
            ("", part) => part.to_owned(),
            (field, "") => field.to_owned(),
            (field, part) => format!("{field}.{part}"),
        }
    }

    /// The value of a key, which says this field of the protocol's ("" for none of its own).
    fn get(&self, key: &'static str, field: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.borrow_mut().push(key);
        let value = self.table?.get(key)?;
        if !field.is_empty() {
            let mut places = self.reading.places.borrow_mut();
            places.insert(self.field(field), value.span());
        }
        Some(value)
    }

    /// What `read` makes of the value of a key.
    fn scalar<T>(
        &self,
        key: &'static str,
        field: &str,
        read: impl FnOnce(Scalar<'a>) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.get(key, field)?;
        match read(Scalar::of(value.get_ref())) {
            Ok(value) => Some(value),
            Err(message) => {
                self.reading.wrong(value.span(), message);
                None
            }
        }
    }

    /// A string, as `parse` reads it.
    pub(super) fn word<T>(
        &self,
        key: &'static str,
        field: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Text(text) => parse(text),
            other => Err(other.instead(key, "a string")),
        })
    }

    /// A string as it is.
    pub(super) fn text(&self, key: &'static str, field: &str) -> Option<String> {
        self.word(key, field, |text| Ok(text.to_owned()))
    }

    /// A whole number.
    pub(super) fn number<T: TryFrom<i128>>(
        &self,
        key: &'static str,
        field: &str,
        possible: RangeInclusive<u64>,
    ) -> Option<T> {
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Number(number) => within(key, number, possible),
            other => Err(other.instead(key, "a whole number")),
        })
    }

    /// true or false.
    pub(super) fn flag(&self, key: &'static str, field: &str) -> Option<bool> {
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Flag(flag) => Ok(flag),
            other => Err(other.instead(key, "true or false")),
        })
    }

    /// Either a string, or true for the value of `on` and false for none.
    pub(super) fn word_or_flag<T>(
        &self,
        key: &'static str,
        field: &str,
        on: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let read = |scalar| match scalar {
            Scalar::Text(text) => parse(text).map(Some),
            Scalar::Flag(flag) => Ok(flag.then_some(on)),
            Scalar::Number(_) | Scalar::Fraction(_) | Scalar::Other(_) => {
                Err(scalar.instead(key, "a string, true or false"))
            }
        };
        self.scalar(key, field, read).flatten()
    }

    /// A number, or a string as `parse` reads it.
    pub(super) fn number_or_word<T: TryFrom<i128>>(
        &self,
        key: &'static str,
        field: &str,
        possible: RangeInclusive<u64>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Number(number) => within(key, number, possible),
            Scalar::Text(text) => parse(text),
            other => Err(other.instead(key, "a number or a string")),
        })
    }

    /// Bytes: a number, or a string with a unit.
    pub(super) fn bytes(&self, key: &'static str, field: &str) -> Option<u64> {
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Number(number) => within(key, number, 0..=u64::MAX),
            Scalar::Text(text) => parse_bytes(text),
            other => Err(other.instead(key, "bytes, or a string with a unit, as \"64M\"")),
        })
    }

    /// MiB: a number, or a string with a unit. At least one, at most `most`.
    pub(super) fn mib(&self, key: &'static str, field: &str, most: u64) -> Option<u64> {
        let possible =
            |mib: i128| within(key, mib, 1..=most).map_err(|message| format!("{message} MiB, and this is {mib}"));
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Number(number) => possible(number),
            Scalar::Text(text) => parse_mib(text).and_then(|mib| possible(mib.into())),
            other => Err(other.instead(key, "MiB, or a string with a unit, as \"512M\"")),
        })
    }

    /// Milliseconds: a number of seconds, or a string with a unit.
    pub(super) fn milliseconds(&self, key: &'static str, field: &str) -> Option<u32> {
        let of_number = |seconds: String| {
            parse_milliseconds(&seconds)
                .map_err(|_| format!("'{key}' is a time of 1ms to 49d, and this is {seconds} s"))
        };
        self.scalar(key, field, |scalar| match scalar {
            Scalar::Number(seconds) => of_number(seconds.to_string()),
            Scalar::Fraction(seconds) => of_number(seconds.to_string()),
            Scalar::Text(text) => parse_milliseconds(text),
            other => Err(other.instead(key, "seconds, or a string with a unit, as \"100ms\"")),
        })
    }

    /// The name of a file of this machine, or, as "path:...", of the guest manager's.
    pub(super) fn file(&self, key: &'static str, field: &str) -> Option<String> {
        self.word(key, field, |name| self.named(name, self.reading.naming.files))
    }

    /// The path of a Unix socket of the guest manager's machine.
    pub(super) fn socket(&self, key: &'static str, field: &str) -> Option<String> {
        self.word(key, field, |name| self.named(name, self.reading.naming.sockets))
    }

    fn named(&self, name: &str, relative: bool) -> Result<String, String> {
        let path = Path::new(name);
        if name.is_empty() {
            return Err("the name of a file is missing".to_owned());
        }
        if path.is_absolute() || uploads::there(path).is_some() {
            return Ok(name.to_owned());
        }
        if !relative {
            return Err(format!(
                "'{name}' is a path of the guest manager's machine, and has to begin with '/'"
            ));
        }
        let path = self.reading.naming.folder.join(path);
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| format!("the path {} is not UTF-8", path.display()))
    }

    /// A list of what `read` makes of each entry and its section, if it is a table; the protocol's name of an entry ends with its number.
    fn list<T>(
        &self,
        key: &'static str,
        field: &str,
        of: &str,
        read: impl Fn(&'a Spanned<DeValue<'a>>, String) -> Option<T>,
    ) -> Vec<T> {
        let Some(value) = self.get(key, field) else {
            return Vec::new();
        };
        let DeValue::Array(array) = value.get_ref() else {
            let message = Scalar::of(value.get_ref()).instead(key, of);
            self.reading.wrong(value.span(), message);
            return Vec::new();
        };
        let name = self.field(field);
        let entries = array.iter().enumerate().filter_map(|(i, entry)| {
            let field = format!("{name}[{i}]");
            self.reading.places.borrow_mut().insert(field.clone(), entry.span());
            read(entry, field)
        });
        entries.collect()
    }

    /// A list of strings.
    pub(super) fn texts(&self, key: &'static str, field: &str) -> Vec<String> {
        self.list(key, field, "an array of strings", |entry, _| match entry.get_ref() {
            DeValue::String(text) => Some(text.clone().into_owned()),
            other => {
                let message = Scalar::of(other).instead(key, "strings");
                self.reading.wrong(entry.span(), message);
                None
            }
        })
    }

    /// A string as `parse` reads it, or a list of numbers.
    pub(super) fn word_or_numbers(
        &self,
        key: &'static str,
        field: &str,
        parse: impl FnOnce(&str) -> Result<Vec<u16>, String>,
    ) -> Option<Vec<u16>> {
        if !matches!(self.table?.get(key)?.get_ref(), DeValue::Array(_)) {
            return self.word(key, field, parse);
        }
        let number = |entry: &'a Spanned<DeValue<'a>>, _| {
            let number = match Scalar::of(entry.get_ref()) {
                Scalar::Number(number) => within(key, number, 0..=u16::MAX.into()),
                other => Err(other.instead(key, "numbers of processors")),
            };
            number.map_err(|message| self.reading.wrong(entry.span(), message)).ok()
        };
        Some(self.list(key, field, "an array", number))
    }

    /// A list of tables.
    pub(super) fn sections(&self, key: &'static str, field: &str) -> Vec<Section<'a>> {
        let of = format!("an array of tables ([[{key}]])");
        self.list(key, field, &of, |entry, field| match entry.get_ref() {
            DeValue::Table(table) => Some(self.part(Some(table), entry.span(), field)),
            other => {
                let message = Scalar::of(other).instead(key, &of);
                self.reading.wrong(entry.span(), message);
                None
            }
        })
    }

    /// A list of strings and tables: each as a table, whose only key a string is the value of.
    pub(super) fn texts_or_sections(&self, key: &'static str, field: &str) -> Vec<Result<String, Section<'a>>> {
        self.list(key, field, "an array", |entry, field| match entry.get_ref() {
            DeValue::String(name) => match self.named(name, self.reading.naming.files) {
                Ok(name) => Some(Ok(name)),
                Err(message) => {
                    self.reading.wrong(entry.span(), message);
                    None
                }
            },
            DeValue::Table(table) => Some(Err(self.part(Some(table), entry.span(), field))),
            other => {
                let message = Scalar::of(other).instead(key, "strings or tables");
                self.reading.wrong(entry.span(), message);
                None
            }
        })
    }

    /// A table.
    pub(super) fn section(&self, key: &'static str, field: &str) -> Option<Section<'a>> {
        let value = self.get(key, field)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(self.part(Some(table), value.span(), self.field(field))),
            other => {
                let message = Scalar::of(other).instead(key, &format!("a table: [{key}]"));
                self.reading.wrong(value.span(), message);
                None
            }
        }
    }

    /// A table, or true for one with nothing in it and false for none.
    pub(super) fn device(&self, key: &'static str, field: &str) -> Option<Section<'a>> {
        let value = self.get(key, field)?;
        match value.get_ref() {
            DeValue::Boolean(false) => None,
            DeValue::Boolean(true) => Some(self.part(None, value.span(), self.field(field))),
            DeValue::Table(table) => Some(self.part(Some(table), value.span(), self.field(field))),
            other => {
                let message = Scalar::of(other).instead(key, &format!("a table ([{key}]), true or false"));
                self.reading.wrong(value.span(), message);
                None
            }
        }
    }

    fn part(&self, table: Option<&'a DeTable<'a>>, span: Range<usize>, field: String) -> Section<'a> {
        Section {
            reading: self.reading,
            table,
            span,
            field,
            known: RefCell::default(),
        }
    }
}

impl Drop for Section<'_> {
    /// Whatever was not asked for by now is not known.
    fn drop(&mut self) {
        let known = self.known.borrow();
        for key in self.table.into_iter().flat_map(DeTable::keys) {
            let name: &str = key.get_ref();
            if !known.contains(&name) {
                self.reading.wrong(key.span(), unknown(name, &known));
            }
        }
    }
}

/// A number as its type, if it is possible.
fn within<T: TryFrom<i128>>(key: &str, number: i128, possible: RangeInclusive<u64>) -> Result<T, String> {
    let (first, last) = (*possible.start(), *possible.end());
    let fits = (i128::from(first)..=i128::from(last))
        .contains(&number)
        .then_some(number);
    let number = fits.and_then(|number| T::try_from(number).ok());
    number.ok_or_else(|| format!("'{key}' is one of {first} to {last}"))
}

/// What is said of a key that is not known.
fn unknown(key: &str, known: &[&str]) -> String {
    let likeness = |known: &str| strsim::jaro_winkler(key, known);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let key = key.escape_debug();
    match nearest {
        Some(nearest) if likeness(nearest) > ALIKE => format!("'{key}' is not known here; did you mean '{nearest}'?"),
        _ => {
            let mut known = known.to_vec();
            known.sort_unstable();
            format!("'{key}' is not known here; known are {}", known.join(", "))
        }
    }
}
