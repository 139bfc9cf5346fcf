//! The files that an ONNX model wants to read beside itself, and how much its weights are.
//!
//! A tensor may name any path as the place of its data, so the names are read before ONNX Runtime is
//! given the model. The walk follows the nesting of `onnx.proto` and steps over everything else: weights,
//! which may be gigabytes, are never held in memory.

use std::collections::BTreeSet;
use std::io::{BufRead, Seek};

/// Longest name or path that is read.
const MAX_NAME: u64 = 4096;
/// Deepest nesting of messages, as protobuf itself has it.
const MAX_DEPTH: usize = 100;
/// Most files that one model may name.
const MAX_FILES: usize = 64;

/// The messages of `onnx.proto` below which tensors lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    SparseTensor,
    Tensor,
    Function,
    Training,
    /// A pair of strings: one property of external data.
    Property,
}

impl Message {
    /// Returns the message in the field of this number, if tensors can lie below it.
    fn field(self, number: u64) -> Option<Self> {
        Some(match (self, number) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) | (Self::Training, 1 | 2) => Self::Graph,
            (Self::Model, 20) => Self::Training,
            (Self::Model, 25) => Self::Function,
            (Self::Graph, 1) | (Self::Function, 7) => Self::Node,
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::SparseTensor, 1 | 2) => Self::Tensor,
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Self::SparseTensor,
            (Self::Node, 5) | (Self::Function, 11) => Self::Attribute,
            (Self::Tensor, 13) => Self::Property,
            _ => return None,
        })
    }
}

/// The files and the weights of a model.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// Names of all files that its tensors want to read.
    pub(super) files: BTreeSet<String>,
    /// Bytes that its tensors take in memory, where numbers of 16 bits are computed with 32.
    pub(super) weight_bytes: u64,
}

/// A message that is being read.
struct Open {
    message: Message,
    end: u64,
    key: Vec<u8>,
    value: Vec<u8>,
    /// Of a tensor: its entries, and the number of their type.
    entries: u64,
    data_type: u64,
}

impl Open {
    fn new(message: Message, end: u64) -> Self {
        Self {
            message,
            end,
            key: Vec::new(),
            value: Vec::new(),
            entries: 1,
            data_type: 0,
        }
    }

    /// Bytes of a tensor's entries in memory; types as `TensorProto.DataType` numbers them.
    fn bytes(&self) -> u64 {
        let entry = match self.data_type {
            // 8-bit integers and truth values; 8-bit floats.
            2 | 3 | 9 | 17..=20 => 1,
            // 64 bits.
            7 | 11 | 13 | 14 => 8,
            _ => 4,
        };
        self.entries.saturating_mul(entry)
    }
}

/// Reads the files and the weights of `model`, of `length` bytes.
///
/// # Errors
/// When the file is not in the format, or goes over a limit.
pub(super) fn contents(model: impl BufRead + Seek, length: u64) -> Result<Contents, String> {
    let mut reader = Reader { model, at: 0 };
    let Contents {
        mut files,
        mut weight_bytes,
    } = Contents::default();
    let mut open = vec![Open::new(Message::Model, length)];
    while let Some(current) = open.last_mut() {
        if reader.at == current.end {
            if current.message == Message::Property && current.key == b"location" {
                files.insert(String::from_utf8_lossy(&current.value).into_owned());
            }
            if current.message == Message::Tensor {
                weight_bytes = weight_bytes.saturating_add(current.bytes());
            }
            open.pop();
            if files.len() > MAX_FILES {
                return Err(format!("it names more than {MAX_FILES} files of external data"));
            }
            continue;
        }
        let tag = reader.varint()?;
        let payload = match tag & 7 {
            0 => {
                let value = reader.varint()?;
                match (current.message, tag >> 3) {
                    (Message::Tensor, 1) => current.entries = current.entries.saturating_mul(value),
                    (Message::Tensor, 2) => current.data_type = value,
                    _ => {}
                }
                0
            }
            1 => 8,
            2 => reader.varint()?,
            5 => 4,
            _ => return Err(format!("it is not an ONNX file (wire type of tag {tag:#x})")),
        };
        let end = reader.at.checked_add(payload).filter(|end| *end <= current.end);
        let Some(end) = end else {
            return Err(format!("it is cut short or damaged at byte {}", reader.at));
        };
        match (tag & 7, tag >> 3, current.message) {
            (2, number @ (1 | 2), Message::Property) => {
                let text = reader.text(payload)?;
                *(if number == 1 {
                    &mut current.key
                } else {
                    &mut current.value
                }) = text;
            }
            // A list of dimensions, packed.
            (2, 1, Message::Tensor) => {
                while reader.at < end {
                    current.entries = current.entries.saturating_mul(reader.varint()?);
                }
                if reader.at > end {
                    return Err(format!("it is cut short or damaged at byte {}", reader.at));
                }
            }
            (2, number, message) if let Some(inner) = message.field(number) => {
                if open.len() == MAX_DEPTH {
                    return Err(format!("it nests deeper than {MAX_DEPTH} messages"));
                }
                open.push(Open::new(inner, end));
            }
            _ => reader.skip(payload)?,
        }
    }
    Ok(Contents { files, weight_bytes })
}

struct Reader<R> {
    model: R,
    at: u64,
}

impl<R: BufRead + Seek> Reader<R> {
    fn byte(&mut self) -> Result<u8, String> {
        let mut byte = [0];
        self.model.read_exact(&mut byte).map_err(|e| e.to_string())?;
        self.at += 1;
        Ok(byte[0])
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(format!(
            "it is damaged at byte {} (a number without end)",
            self.at
        ))
    }

    fn text(&mut self, length: u64) -> Result<Vec<u8>, String> {
        if length > MAX_NAME {
            return Err(format!(
                "a property of external data has {length} bytes, allowed are {MAX_NAME}"
            ));
        }
        let mut text = vec![0; length as usize];
        self.model.read_exact(&mut text).map_err(|e| e.to_string())?;
        self.at += length;
        Ok(text)
    }

    fn skip(&mut self, length: u64) -> Result<(), String> {
        if length > 0 {
            let by = i64::try_from(length).map_err(|e| e.to_string())?;
            self.model.seek_relative(by).map_err(|e| e.to_string())?;
            self.at += length;
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(super) mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    /// A field that holds `payload`.
    fn field(number: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, payload.len() as u8];
        // A second byte of the tag for numbers above 15.
        if number > 15 {
            bytes.splice(..1, [(number << 3 | 2) | 0x80, number >> 4]);
        }
        bytes.extend(payload);
        bytes
    }

    fn tensor(location: &str) -> Vec<u8> {
        let property = |key: &str, value: &str| {
            field(
                13,
                &[field(1, key.as_bytes()), field(2, value.as_bytes())].concat(),
            )
        };
        let weights = field(9, &[0; 40]);
        [
            weights,
            property("location", location),
            property("offset", "4096"),
        ]
        .concat()
    }

    /// A model whose only weight lies in the file `location`.
    pub(in crate::bundle) fn model_with_external_data(location: &str) -> Vec<u8> {
        field(7, &field(5, &tensor(location)))
    }

    fn read(bytes: &[u8]) -> Result<BTreeSet<String>, String> {
        contents(Cursor::new(bytes), bytes.len() as u64).map(|contents| contents.files)
    }

    #[test]
    fn weights_are_counted_as_they_are_computed_with() {
        let bytes = |dimensions: &[u8], data_type: u8| {
            let tensor = [dimensions, &[2 << 3, data_type]].concat();
            let model = field(7, &field(5, &tensor));
            let contents = contents(Cursor::new(&model), model.len() as u64);
            contents.unwrap().weight_bytes
        };
        let packed = field(1, &[0x80, 2, 3]);
        let apart = [1 << 3, 0x80, 2, 1 << 3, 3];
        for dimensions in [packed.as_slice(), &apart] {
            let of = |data_type| bytes(dimensions, data_type);
            // float32, float16, bfloat16; uint8 and int8; int64 and double.
            let (four, one, eight) = ([1, 10, 16].map(of), [2, 3].map(of), [7, 11].map(of));
            assert_eq!((four, one, eight), ([3072; 3], [768; 2], [6144; 2]));
        }
        // A scalar; and more than there is.
        assert_eq!(bytes(&[], 1), 4);
        assert_eq!(
            bytes(&field(1, &[&[0xff; 9][..], &[1, 9]].concat()), 11),
            u64::MAX
        );
    }

    #[test]
    fn names_are_found_wherever_a_tensor_may_lie() {
        let tensor = tensor("a");
        let attribute = field(5, &tensor);
        let node = |attribute: &[u8]| field(1, &field(5, attribute));
        let subgraph = field(6, &field(5, &tensor));
        let sparse = field(15, &field(1, &tensor));
        for (place, model) in [
            ("initializer", model_with_external_data("a")),
            ("constant", field(7, &node(&attribute))),
            ("constants", field(7, &node(&field(10, &tensor)))),
            ("subgraph", field(7, &node(&subgraph))),
            ("sparse", field(7, &sparse)),
            ("sparse constant", field(7, &node(&field(22, &field(2, &tensor))))),
            ("training", field(20, &field(1, &field(5, &tensor)))),
            ("function", field(25, &field(7, &field(5, &attribute)))),
        ] {
            assert_eq!(read(&model).unwrap(), ["a".to_owned()].into(), "{place}");
        }
    }

    #[test]
    fn a_model_of_its_own_names_nothing() {
        assert!(read(&[]).unwrap().is_empty());
        let graph = field(7, &field(5, &field(9, b"weights that say location")));
        assert!(read(&[vec![8, 9], graph].concat()).unwrap().is_empty());
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let model = model_with_external_data("a");
        for length in 1..model.len() {
            assert!(read(&model[..length]).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(read(&bytes));
        }
    }
}
