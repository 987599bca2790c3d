//! Random mutation of samples.

use rand::{Rng as _, RngExt as _, rngs::StdRng};

/// Inputs are cut to this length after each mutation, in bytes.
const MAX_LENGTH: usize = 4_096;
/// Limit of mutations per input.
const MAX_MUTATIONS: usize = 6;
/// Boundary values of integers.
const NUMBERS: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];
/// Texts that parsers often mishandle.
const WORDS: [&str; 16] = [
    "null",
    "[]",
    "{}",
    "\"\"",
    "true",
    "-1",
    "1e999",
    "0.1",
    "\\u0000",
    "\\ud800",
    "\n",
    "\u{1b}[2J",
    "::/0",
    "10.42.0.0/33",
    "99999999999999999999",
    "../../../etc/passwd",
];
/// Number of brackets that one mutation nests.
const DEPTH: usize = 300;

/// An endless source of inputs.
pub(super) struct Mutator {
    rng: StdRng,
    samples: Vec<Vec<u8>>,
    input: Vec<u8>,
}

impl Mutator {
    /// Returns a mutator of these samples, of which there must be at least one.
    pub(super) const fn new(rng: StdRng, samples: Vec<Vec<u8>>) -> Self {
        Self { rng, samples, input: Vec::new() }
    }

    /// Returns the next input.
    pub(super) fn next(&mut self) -> &[u8] {
        let sample = self.rng.random_range(0..self.samples.len());
        self.input.clear();
        self.input.extend_from_slice(&self.samples[sample]);
        for _ in 0..self.rng.random_range(1..=MAX_MUTATIONS) {
            self.mutate();
            self.input.truncate(MAX_LENGTH);
        }
        &self.input
    }

    /// Applies one random mutation to the input.
    fn mutate(&mut self) {
        let rng = &mut self.rng;
        let length = self.input.len();
        let at = rng.random_range(0..=length);
        let end = rng.random_range(at..=length.min(at + 32));
        match rng.random_range(0..10) {
            0 | 1 if at < length => self.input[at] ^= 1 << rng.random_range(0..8),
            2 if at < length => self.input[at] = rng.random(),
            3 => drop(self.input.drain(at..end)),
            4 => {
                let mut bytes = [0; 8];
                rng.fill_bytes(&mut bytes);
                let count = rng.random_range(0..=8);
                self.input.splice(at..at, bytes[..count].iter().copied());
            }
            5 => {
                let part = self.input[at..end].to_vec();
                self.input.splice(at..at, part);
            }
            6 => self.input.truncate(at),
            7 => {
                let number = NUMBERS[rng.random_range(0..NUMBERS.len())];
                let width = 1 << rng.random_range(0..4);
                let bytes = match rng.random() {
                    true => number.to_le_bytes()[..width].to_vec(),
                    false => number.to_be_bytes()[8 - width..].to_vec(),
                };
                self.input.splice(at..length.min(at + width), bytes);
            }
            8 => {
                let other = &self.samples[rng.random_range(0..self.samples.len())];
                let from = rng.random_range(0..=other.len());
                let to = rng.random_range(from..=other.len());
                let part = other[from..to].to_vec();
                self.input.splice(at..end, part);
            }
            9 if rng.random_range(0..64) == 0 => {
                let open = if rng.random() { b'[' } else { b'{' };
                self.input.splice(at..at, std::iter::repeat_n(open, DEPTH));
            }
            _ => {
                let word = WORDS[rng.random_range(0..WORDS.len())];
                self.input.splice(at..end, word.bytes());
            }
        }
    }
}
