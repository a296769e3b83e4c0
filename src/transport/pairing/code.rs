//! The code itself: 80 random bits in Crockford's base 32, `7K3M-9QXT-0WBD-VZ5H`.

use std::{fmt, str::FromStr};

/// Digits; I, L, O and U are missing, so that none is mistaken for another.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Bytes of a code.
const LEN: usize = 10;
/// Digits of a code, five bits each.
const DIGITS_LEN: usize = LEN * 8 / 5;
/// What the key is derived for (BLAKE3 wants a text that no other use has).
const KEY_CONTEXT: &str = "standin 2025-01 pairing code to MAC key";

/// A pairing code. Shown by `Display` alone, never by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingCode([u8; LEN]);

/// Why a text is no code.
#[derive(Debug, thiserror::Error)]
#[error(
    "that is no pairing code: {DIGITS_LEN} letters and digits as `standin pair --listen` shows them on the other host"
)]
pub struct CodeError;

impl PairingCode {
    /// A new one, of the system's randomness.
    pub(super) fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; LEN];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    pub(super) fn key(&self) -> [u8; 32] {
        blake3::derive_key(KEY_CONTEXT, &self.0)
    }
}

impl fmt::Display for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0.iter().fold(0u128, |bits, byte| bits << 8 | u128::from(*byte));
        for place in 0..DIGITS_LEN {
            if place > 0 && place % 4 == 0 {
                f.write_str("-")?;
            }
            let digit = bits >> (5 * (DIGITS_LEN - 1 - place)) & 31;
            write!(f, "{}", char::from(DIGITS[digit as usize]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairingCode(secret)")
    }
}

impl FromStr for PairingCode {
    type Err = CodeError;

    fn from_str(text: &str) -> Result<Self, CodeError> {
        let mut bits = 0u128;
        let mut digits = 0;
        for byte in text.bytes().filter(|b| *b != b'-' && !b.is_ascii_whitespace()) {
            let digit = match byte.to_ascii_uppercase() {
                b'O' => b'0',
                b'I' | b'L' => b'1',
                other => other,
            };
            let value = DIGITS.iter().position(|d| *d == digit).ok_or(CodeError)?;
            digits += 1;
            if digits > DIGITS_LEN {
                return Err(CodeError);
            }
            bits = bits << 5 | value as u128;
        }
        if digits < DIGITS_LEN {
            return Err(CodeError);
        }
        let bytes = bits.to_be_bytes();
        Ok(Self(std::array::from_fn(|at| bytes[bytes.len() - LEN + at])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_reads_back_as_shown_however_it_is_typed() {
        for _ in 0..100 {
            let code = PairingCode::generate().unwrap();
            let shown = code.to_string();
            assert_eq!(shown.len(), DIGITS_LEN + 3);
            let sloppy = shown.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l");
            assert!(shown.parse::<PairingCode>().unwrap() == code);
            assert!(sloppy.parse::<PairingCode>().unwrap() == code);
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for text in
            ["", "7K3M-9QXT-0WBD-VZ5", "7K3M-9QXT-0WBD-VZ5HH", "7K3M-9QXT-0WBD-VZ5U", "é7K3M9QXT0WBDVZ5H"]
        {
            assert!(text.parse::<PairingCode>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_code_does_not_show_in_debug_output() {
        let code = PairingCode::generate().unwrap();
        assert_eq!(format!("{code:?}"), "PairingCode(secret)");
    }
}
