//! Inputs that are almost right, for what reads the files and the messages of strangers.
//!
//! An input is made by a recipe: bytes that say which sound input to begin with and what to change about it. Tests cook
//! those of `tests/fixtures/recipes`, which libFuzzer has found to go different ways, and then some that are drawn, always
//! the same ones; `make fuzz` has libFuzzer look for more.
#![expect(clippy::unwrap_used, reason = "tests")]
#![cfg_attr(fuzzing, allow(dead_code, reason = "libFuzzer draws the recipes then"))]

use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Recipes that are drawn where no time is given.
const DRAWN: u64 = 300;
/// Bytes of a recipe that is drawn, at most.
const LONGEST: usize = 48;
/// Bytes that an input has beyond those it began with, at most.
const MORE: usize = 1 << 16;

/// What reads inputs of one kind.
pub(crate) struct Target<'a> {
    /// The name of its file of recipes.
    pub(crate) name: &'a str,
    /// Inputs that are right.
    pub(crate) sound: Vec<Vec<u8>>,
    /// What means something in such inputs, where it stands in a wrong place.
    pub(crate) words: &'a [&'a [u8]],
}

/// Numbers that are easily forgotten, as text.
const NUMBERS: [&[u8]; 12] = [
    b"0",
    b"-1",
    b"1e999",
    b"-1e-999",
    b"0.5",
    b"2147483648",
    b"4294967295",
    b"4294967296",
    b"9007199254740993",
    b"18446744073709551615",
    b"18446744073709551616",
    b"null",
];

impl Target<'_> {
    /// Runs `check` on inputs by the recipes that are kept, then by drawn ones: so many, or for as long as
    /// `DENOISED_FUZZ_SECONDS` says.
    pub(crate) fn run(&self, mut check: impl FnMut(&[u8])) {
        let seconds = std::env::var("DENOISED_FUZZ_SECONDS").ok();
        let time = seconds.map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
        let mut check = |recipe: &[u8]| {
            let told = Told(recipe);
            check(&self.cook(recipe));
            drop(told);
        };
        check(&[]);
        self.kept().iter().for_each(|recipe| check(recipe));
        let (started, mut random) = (Instant::now(), SmallRng::seed_from_u64(1));
        for drawn in 0.. {
            if time.map_or(drawn >= DRAWN, |time| started.elapsed() >= time) {
                break;
            }
            let length = random.random_range(2..LONGEST);
            let recipe: Vec<u8> = (0..length).map(|_| random.random()).collect();
            check(&recipe);
        }
    }

    /// One recipe a line, in hexadecimal.
    fn kept(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recipes");
        let file = folder.join(format!("{}.txt", self.name));
        let text = std::fs::read_to_string(&file).unwrap();
        let byte = |digits: &[u8]| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
        let recipe = |line: &str| line.as_bytes().chunks(2).map(byte).collect();
        text.lines().map(recipe).collect()
    }

    /// The input that `recipe` makes.
    pub(crate) fn cook(&self, recipe: &[u8]) -> Vec<u8> {
        let mut recipe = Recipe(recipe);
        let mut input = self.sound[recipe.below(self.sound.len())].clone();
        let most = input.len() + MORE;
        while !recipe.0.is_empty() {
            let (change, at) = (recipe.byte(), recipe.place(input.len()));
            match change % 10 {
                0 => {
                    let byte = recipe.byte();
                    input.get_mut(at).into_iter().for_each(|there| *there = byte);
                }
                1 => {
                    let bit = recipe.below(8);
                    input.get_mut(at).into_iter().for_each(|there| *there ^= 1 << bit);
                }
                2 => {
                    let word = self.words[recipe.below(self.words.len())];
                    input.splice(at..at, word.iter().copied());
                }
                3 => {
                    let word = self.words[recipe.below(self.words.len())];
                    let end = (at + word.len()).min(input.len());
                    input.splice(at..end, word.iter().copied());
                }
                4 => {
                    let end = (at + recipe.below(256) + 1).min(input.len());
                    input.drain(at..end);
                }
                5 => {
                    let from = recipe.place(input.len());
                    let end = (from + recipe.below(256) + 1).min(input.len());
                    let copied = input[from..end].to_vec();
                    input.splice(at..at, copied);
                }
                6 => {
                    let (byte, times) = (recipe.byte(), recipe.below(256));
                    input.splice(at..at, std::iter::repeat_n(byte, times * times));
                }
                7 => input.truncate(at),
                8 => {
                    let other = &self.sound[recipe.below(self.sound.len())];
                    input.truncate(at);
                    input.extend(&other[recipe.place(other.len())..]);
                }
                // The number that stands there, or after it.
                _ => {
                    let number = NUMBERS[recipe.below(NUMBERS.len())];
                    let is_part = |byte: &&u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
                    let begin = input[at..].iter().position(u8::is_ascii_digit);
                    if let Some(begin) = begin.map(|begin| at + begin) {
                        let digits = input[begin..].iter().take_while(is_part).count();
                        input.splice(begin..begin + digits, number.iter().copied());
                    }
                }
            }
            input.truncate(most);
        }
        input
    }
}

/// What is left of a recipe; zeros after its end.
struct Recipe<'a>(&'a [u8]);

impl Recipe<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// A place in an input of `length` bytes, or at its end: scaled, so that a recipe fits inputs of all lengths.
    fn place(&mut self, length: usize) -> usize {
        let share = usize::from(u16::from_be_bytes([self.byte(), self.byte()]));
        (share * (length + 1)) >> 16
    }
}

/// Tells the recipe of an input that does harm.
struct Told<'a>(&'a [u8]);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("by the recipe {}", crate::bundle::hexadecimal(self.0));
        }
    }
}

/// Has a target run; libFuzzer where the test is built for that (`cargo bolero`).
macro_rules! fuzz {
    ($target:expr, $check:expr) => {{
        let (target, check) = ($target, $check);
        // A check that has panicked is the last one.
        #[cfg(fuzzing)]
        let both = std::panic::AssertUnwindSafe((target, check));
        #[cfg(fuzzing)]
        bolero::check!().for_each(move |recipe: &[u8]| {
            let both = &both;
            let (target, check) = &**both;
            check(&target.cook(recipe));
        });
        #[cfg(not(fuzzing))]
        target.run(|input: &[u8]| check(input));
    }};
}
pub(crate) use fuzz;

#[cfg(not(fuzzing))]
#[test]
fn recipes_change_what_they_say() {
    let target = Target {
        name: "",
        sound: vec![b"{\"a\": 12}".to_vec(), b"[]".to_vec()],
        words: &[b"word"],
    };
    let cooked = |recipe: &[u8]| String::from_utf8(target.cook(recipe)).unwrap();
    for (recipe, makes) in [
        (&[][..], "{\"a\": 12}"),
        (&[1], "[]"),
        (&[1, 2, 0, 0, 0], "word[]"),
        (&[0, 7, 0, 0], ""),
        // At the tenth of ten places, the end, there is nothing to change.
        (&[0, 0, 255, 255, 65], "{\"a\": 12}"),
        (&[0, 9, 0, 0, 1], "{\"a\": -1}"),
        (&[1, 6, 128, 0, b' ', 3], "[         ]"),
    ] {
        assert_eq!(cooked(recipe), makes, "{recipe:?}");
    }
    let endless: Vec<u8> = [6, 0, 0, b'x', 255].repeat(1000);
    assert!(target.cook(&[&[0][..], &endless].concat()).len() <= 9 + MORE);
}
