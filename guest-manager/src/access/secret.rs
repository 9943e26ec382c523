//! What a token has to tell, and what is kept of it: only its digest, so that nobody who reads what is kept can redeem anything.

use std::fmt::Write;

use sepal_schema::error::{Error, Kind};
use sha2::{Digest as _, Sha256};

/// 256 bits from the kernel's generator, known to whoever was given the token.
pub(crate) type Secret = [u8; 32];

/// The SHA-256 of a secret. Two are compared as they are: where they differ says nothing about the secret.
pub(crate) type Digest = [u8; 32];

/// A secret that nobody knows yet.
///
/// # Errors
/// The kernel gives no random bytes.
pub(crate) fn fresh() -> Result<Secret, Error> {
    let mut secret = Secret::default();
    getrandom::fill(&mut secret).map_err(|error| {
        let message = format!("the kernel gives no random bytes: {error}");
        Error::new(Kind::InternalError, message)
    })?;
    Ok(secret)
}

/// What is kept of a secret.
pub(crate) fn digest(secret: &Secret) -> Digest {
    Sha256::digest(secret).into()
}

/// In hexadecimal, as in tokens.
pub(crate) fn hex(secret: &Secret) -> String {
    secret.iter().fold(String::new(), |mut text, byte| {
        // Writing into a text does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads 64 hexadecimal digits; none for anything else.
pub(crate) fn of_hex(hex: &str) -> Option<Secret> {
    let mut secret = Secret::default();
    if hex.len() != 2 * secret.len() || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in secret.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_survives_its_digits_and_nothing_else_is_one() {
        let secret = fresh().unwrap();
        assert_ne!(secret, fresh().unwrap());
        let digits = hex(&secret);
        assert_eq!(of_hex(&digits), Some(secret));
        for wrong in ["", &digits[1..], &format!("{digits}0"), &format!("{}+f", &digits[2..])] {
            assert_eq!(of_hex(wrong), None, "{wrong}");
        }
        // FIPS 180-4, of 32 zero bytes.
        let known = "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925";
        assert_eq!(hex(&digest(&Secret::default())), known);
    }
}
