//! Text from files and from standard input.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::Failed;

/// Bytes that are read at most; servers take less.
const MAX_BYTES: u64 = 64 << 20;

/// The text of `file`, or of standard input where it is `-`, without the line break at its end.
///
/// # Errors
/// When it cannot be read, is no UTF-8 or larger than 64 MB.
pub(super) fn read(file: &Path) -> Result<String, Failed> {
    let name = file.display();
    let bytes = if file.as_os_str() == "-" {
        all(io::stdin().lock())
    } else {
        File::open(file).and_then(all)
    };
    let bytes = bytes.map_err(|e| Failed::usage(format!("{name}: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| Failed::usage(format!("{name}: {e}")))?;
    let line = text
        .strip_suffix('\n')
        .map(|text| text.strip_suffix('\r').unwrap_or(text));
    Ok(line.unwrap_or(&text).to_owned())
}

fn all(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("has more than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn one_line_break_at_the_end_is_the_files_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompt");
        for (bytes, text) in [
            (&b"And God said\n"[..], Some("And God said")),
            (b"two\r\n", Some("two")),
            (b"a\n\n", Some("a\n")),
            (b"", Some("")),
            (b"\xff", None),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).ok().as_deref(), text);
        }
        let error = read(&folder.path().join("nowhere")).unwrap_err();
        assert!(error.message.contains("nowhere"), "{}", error.message);
        assert!(
            all(io::repeat(0)).is_err(),
            "what never ends is not read for ever"
        );
    }
}
