//! Bearer tokens: who calls, and what they may do.
//!
//! The file holds the SHA-256 of each token. A token is 256 random bits, which nobody finds by trying, so a hash that is
//! slow on purpose, as passwords need it, would add nothing but its time to every call. Hashes are compared in constant
//! time, all of them, so that time tells neither how much of one was right nor whose it was.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::caller::Principal;
use super::watched::{FileError, Watched, contents};
use crate::bundle::hexadecimal;
use crate::engine::Caller;

/// Tokens of one file, at most: each call compares with all of them.
const MOST: usize = 1000;
/// Bytes of an unknown field that may be told, at most.
const LONGEST_FIELD: usize = 12;
/// Characters of a name, at most.
const LONGEST_NAME: usize = 64;
/// How a token begins, so that whoever finds one knows what it is.
const PREFIX: &str = "denoised_";
/// Random bytes of a token.
const RANDOM: usize = 32;

/// The file of tokens.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    token: Vec<Entry>,
}

/// One token, as it is written down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    models: Option<Vec<String>>,
    max_share: Option<f64>,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    admin: bool,
}

fn one() -> u32 {
    1
}

#[derive(Debug)]
pub(super) struct Known {
    hash: [u8; 32],
    principal: Principal,
}

/// The tokens that are accepted now.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    file: PathBuf,
    known: Arc<ArcSwap<Vec<Known>>>,
    written: Vec<u8>,
}

/// Why a call is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unknown {
    #[error("this server asks for a token: send \"authorization: Bearer TOKEN\"")]
    None,
    #[error("the authorization is not of the form \"Bearer TOKEN\"")]
    Malformed,
    #[error("the token is not known")]
    Token,
}

impl Tokens {
    /// The tokens in `file`, if there is one.
    pub(super) fn open(file: Option<&PathBuf>) -> Result<Option<Self>, FileError> {
        let Some(file) = file else { return Ok(None) };
        let written = contents(file)?;
        let known = read(&written).map_err(|problem| FileError::new(file, problem))?;
        Ok(Some(Self {
            file: file.clone(),
            known: Arc::new(ArcSwap::from_pointee(known)),
            written,
        }))
    }

    /// Whose token a request has.
    pub(super) fn principal(&self, headers: &HeaderMap) -> Result<Principal, Unknown> {
        let mut all = headers.get_all(AUTHORIZATION).iter();
        let (value, more) = (all.next().ok_or(Unknown::None)?, all.next());
        let value = value.to_str().map_err(|_| Unknown::Malformed)?;
        let (scheme, token) = value.split_once(' ').ok_or(Unknown::Malformed)?;
        if more.is_some() || !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Unknown::Malformed);
        }
        let hash = Sha256::digest(token.trim());
        let known = self.known.load();
        let found = known.iter().fold(None, |found, known| {
            let is_same = bool::from(hash.as_slice().ct_eq(&known.hash));
            if is_same { Some(&known.principal) } else { found }
        });
        found.cloned().ok_or(Unknown::Token)
    }
}

impl Watched for Tokens {
    const NAME: &'static str = "file of tokens";

    fn look(&mut self) -> Result<(), FileError> {
        let written = contents(&self.file)?;
        if written != self.written {
            let known = read(&written).map_err(|problem| FileError::new(&self.file, problem))?;
            tracing::info!(tokens = known.len(), "the tokens have changed");
            self.known.store(Arc::new(known));
            self.written = written;
        }
        Ok(())
    }
}

/// The tokens of a file, or the first thing that is wrong with it. Nothing of it is repeated: somebody may have put a
/// token where its hash belongs.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<Known>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
    let written: Written = toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.map_or(0, |before| before.matches('\n').count()) + 1;
        format!("line {line}: {}", what_is_wrong(error.message()))
    })?;
    if written.token.is_empty() {
        return Err("has no [[token]]".to_owned());
    }
    if written.token.len() > MOST {
        return Err(format!(
            "has {} tokens, at most {MOST} are allowed",
            written.token.len()
        ));
    }
    let mut known: Vec<Known> = Vec::with_capacity(written.token.len());
    for (entry, number) in written.token.into_iter().zip(1..) {
        let wrong = |problem: &str| format!("token {number}: {problem}");
        let hash = digest(&entry.sha256).ok_or_else(|| wrong("sha256 must be 64 hexadecimal digits"))?;
        if known.iter().any(|other| other.hash == hash) {
            return Err(wrong("sha256 is that of another token"));
        }
        let principal = entry.principal().map_err(|problem| wrong(&problem))?;
        known.push(Known { hash, principal });
    }
    Ok(known)
}

/// What a parser's message says without the value that it is about.
fn what_is_wrong(message: &str) -> &str {
    let unknown = message.strip_prefix("unknown field `");
    // No field is called as a token is: somebody has put one where a name belongs.
    let is_short = |(field, _): (&str, &str)| field.len() <= LONGEST_FIELD;
    let may_be_told = unknown
        .and_then(|rest| rest.rsplit_once("`, expected"))
        .is_some_and(is_short);
    if may_be_told || message.starts_with("missing field") {
        return message;
    }
    "is not as a file of tokens must be: [[token]] with name, sha256 and, if wanted, models (a list), max_share, \
     weight, admin"
}

fn digest(hexadecimal: &str) -> Option<[u8; 32]> {
    let digits = hexadecimal.as_bytes();
    // Signs are parts of numbers, not of hashes.
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, digits) in hash.iter_mut().zip(digits.chunks(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(hash)
}

/// What is wrong with the name of a principal, if something is: names stand in the log.
fn check_name(name: &str) -> Result<(), String> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_allowed) {
        return Err(format!(
            "name must be 1 to {LONGEST_NAME} letters, digits and any of - _ . @"
        ));
    }
    Ok(())
}

impl Entry {
    fn principal(self) -> Result<Principal, String> {
        check_name(&self.name)?;
        if !(1..=Caller::MAX_WEIGHT).contains(&self.weight) {
            return Err(format!("weight must be 1 to {}", Caller::MAX_WEIGHT));
        }
        if self.max_share.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return Err("max_share must be above 0 and at most 1".to_owned());
        }
        if self.models.as_ref().is_some_and(Vec::is_empty) {
            return Err("models is empty: leave it out for all of them".to_owned());
        }
        let caller = Caller::new(self.name)
            .with_weight(self.weight)
            .with_max_share(self.max_share);
        Ok(Principal::known(caller, self.models, self.admin))
    }
}

/// A new token, and what is written down of it.
#[derive(Debug)]
pub(crate) struct NewToken {
    /// The token, for whoever is to have it.
    pub(crate) token: String,
    /// The lines for the file of tokens.
    pub(crate) entry: String,
}

impl NewToken {
    /// A token for the principal `name`.
    ///
    /// # Errors
    /// When the name is not one, or there is no randomness to be had.
    pub(crate) fn draw(name: &str) -> Result<Self, String> {
        check_name(name)?;
        let mut random = [0; RANDOM];
        getrandom::fill(&mut random).map_err(|error| format!("no random bytes: {error}"))?;
        let token = format!("{PREFIX}{}", hexadecimal(&random));
        let hash = hexadecimal(&Sha256::digest(&token));
        let entry = format!("[[token]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n");
        Ok(Self { token, entry })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Tokens {
        Tokens {
            file: PathBuf::new(),
            known: Arc::new(ArcSwap::from_pointee(read(text.as_bytes()).unwrap())),
            written: Vec::new(),
        }
    }

    fn headers(authorization: &[&str]) -> HeaderMap {
        let values = authorization
            .iter()
            .map(|value| (AUTHORIZATION, value.parse().unwrap()));
        values.collect()
    }

    #[test]
    fn a_new_token_is_known_by_its_entry_and_nothing_else_is() {
        let (own, other) = (NewToken::draw("own").unwrap(), NewToken::draw("other").unwrap());
        assert!(!own.entry.contains(&own.token) && own.token != other.token);
        let tokens = tokens(&format!("{}\n{}weight = 3\n", other.entry, own.entry));
        let who = |headers: &[&str]| {
            let principal = tokens.principal(&self::headers(headers));
            principal.map(|principal| principal.caller().to_string())
        };
        let bearer = format!("Bearer {}", own.token);
        assert_eq!(who(&[&bearer]), Ok("own".to_owned()));
        assert_eq!(who(&[&format!("bearer  {}", own.token)]), Ok("own".to_owned()));
        assert_eq!(who(&[&format!("Bearer {}", other.token)]), Ok("other".to_owned()));
        assert_eq!(who(&[]), Err(Unknown::None));
        assert_eq!(who(&[&own.token]), Err(Unknown::Malformed));
        assert_eq!(who(&[&format!("Basic {}", own.token)]), Err(Unknown::Malformed));
        assert_eq!(
            who(&[&bearer, &bearer]),
            Err(Unknown::Malformed),
            "which is meant?"
        );
        assert_eq!(who(&["Bearer "]), Err(Unknown::Token));
        assert_eq!(who(&[&bearer[..bearer.len() - 1]]), Err(Unknown::Token));
        let hash = own.entry.split('"').nth(3).unwrap();
        assert_eq!(
            who(&[&format!("Bearer {hash}")]),
            Err(Unknown::Token),
            "the hash is no token"
        );
    }

    #[test]
    fn mistakes_in_the_file_are_named_and_no_value_is_repeated() {
        let good = NewToken::draw("good").unwrap();
        let secret = &good.token;
        let entry = &good.entry;
        for (text, says) in [
            (String::new(), "no [[token]]"),
            (format!("{entry}{entry}"), "token 2: sha256 is that of another"),
            (
                format!("[[token]]\nname = \"a\"\nsha256 = \"{secret}\""),
                "64 hexadecimal",
            ),
            (format!("[[token]]\nname = \"a\"\nsha256 = {secret}"), "line 3"),
            ("[[token]]\nname = \"a\"".to_owned(), "missing field `sha256`"),
            (
                format!("[[token]]\nname = \"a\"\nsha256 = \"{}\"", "+f".repeat(32)),
                "64 hexadecimal",
            ),
            (format!("{entry}weigth = 2"), "unknown field `weigth`"),
            (format!("{entry}{secret} = \"a\""), "line 4: is not as"),
            (format!("{entry}'a`{secret}' = 1"), "line 4: is not as"),
            (format!("{entry}weight = 0"), "weight must be 1 to 1000"),
            (format!("{entry}weight = \"{secret}\""), "line 4"),
            (format!("{entry}max_share = 1.5"), "max_share must be"),
            (format!("{entry}max_share = nan"), "max_share must be"),
            (format!("{entry}models = []"), "models is empty"),
            (entry.replace("good", "a b"), "name must be"),
            (entry.replace("good", &"a".repeat(65)), "name must be"),
        ] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert!(problem.contains(says), "{text}: {problem}");
            assert!(
                !problem.contains(secret) && problem.lines().count() == 1,
                "{problem}"
            );
        }
        assert!(NewToken::draw("a b").is_err());
    }
}
