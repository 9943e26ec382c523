//! A command as it stands on the command line: `NAME[@DEVICE][:ARGUMENT]...`.

use alloc::format;
use core::str::FromStr;

use crate::guest::Failure;

/// One command, taken apart.
#[derive(Clone, Copy)]
pub(crate) struct Arguments<'a> {
    /// Which of the devices of the wanted kind, in the order of the bus.
    pub(crate) device: usize,
    /// What follows the first colon.
    rest: &'a str,
}

impl<'a> Arguments<'a> {
    /// Takes a command apart into its name and arguments.
    pub(crate) fn parse(command: &'a str) -> (&'a str, Self) {
        let (head, rest) = command.split_once(':').unwrap_or((command, ""));
        let (name, device) = head.split_once('@').unwrap_or((head, "0"));
        let device = device.parse().unwrap_or(usize::MAX);
        (name, Self { device, rest })
    }

    /// Argument `index`, if it is there and not empty.
    pub(crate) fn text(&self, index: usize) -> Option<&'a str> {
        self.rest.split(':').nth(index).filter(|text| !text.is_empty())
    }

    /// Argument `index` as a number, or `default` where there is none.
    pub(crate) fn number<N: FromStr>(&self, index: usize, default: N) -> Result<N, Failure> {
        match self.text(index) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .map_err(|_| Failure(format!("argument {index}, {text:?}, is no number that fits"))),
        }
    }

    /// Argument `index`, an address: decimal, or hexadecimal with 0x before it.
    pub(crate) fn address(&self, index: usize) -> Result<u64, Failure> {
        let text = self.text(index).unwrap_or_default();
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map_err(|_| Failure(format!("argument {index}, {text:?}, is no address")))
    }
}
