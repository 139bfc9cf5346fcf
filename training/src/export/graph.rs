//! Writes ONNX graphs: nodes and stored tensors in, one `GraphProto` out, with the tensors in it or in a
//! file beside it.
//!
//! Knows the file format and nothing of the network.

use std::collections::BTreeSet;
use std::io::{self, Write};

use denoised::bundle::BundleFile;

use half::f16;

use super::schema::{
    AttributeProto, AttributeType, DataLocation, DataType, Dimension, GraphProto, Length, NodeProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use super::{ExportError, Storage};

/// Operators of ONNX Runtime's own, beside those of the standard.
pub(super) const CONTRIBUTED: &str = "com.microsoft";
/// Tensors of fewer bytes stay in the graph, where tools see the constants that shapes follow from.
const SMALLEST_EXTERNAL: usize = 1024;
/// Tensors in a file of their own begin at multiples of a page, so that they can be mapped.
const ALIGNMENT: u64 = 4096;
/// Bytes that are converted at a time on their way to a file.
const CHUNK: usize = 1 << 16;
/// Largest magnitude of a number of 8 bits that stands for an activation.
const MAX_ACTIVATION: f32 = 127.0;
/// Largest magnitude of a number of 8 bits that stands for a weight. Processors without VNNI add two products at a time in
/// 16 bits, which would not hold them: there the server asks ONNX Runtime for sums that do.
const MAX_WEIGHT: f32 = 127.0;
/// The zero of a uint8 that is used as a signed number.
const ZERO_UINT8: u8 = 128;
/// Smallest step between quantised numbers, so that a row of zeros can be divided by it.
const LEAST_STEP: f32 = 1e-12;

/// Name of a tensor in the graph.
pub(super) type Value = String;

/// A graph under construction; nodes run in the order in which they are added.
#[derive(Debug)]
pub(super) struct Builder<'a> {
    storage: Storage,
    scope: String,
    graph: GraphProto,
    constants: BTreeSet<String>,
    /// Where large tensors go as they come; without, into the graph.
    external: Option<&'a mut BundleFile>,
    /// What writing there met first.
    failure: Option<io::Error>,
}

impl<'a> Builder<'a> {
    /// An empty graph called `name`, whose matrices are kept as `storage`, large ones in `external`.
    pub(super) fn new(name: &str, storage: Storage, external: Option<&'a mut BundleFile>) -> Self {
        let graph = GraphProto {
            name: Some(name.to_owned()),
            ..GraphProto::default()
        };
        Self {
            storage,
            scope: String::new(),
            graph,
            constants: BTreeSet::new(),
            external,
            failure: None,
        }
    }

    /// What names of the nodes to come start with.
    pub(super) fn scope(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// An input of the graph.
    pub(super) fn input(&mut self, name: &str, element: DataType, shape: &[Axis]) -> Value {
        self.graph.input.push(value_info(name, element, shape));
        name.to_owned()
    }

    /// A node with one output, of an operator in [`CONTRIBUTED`].
    pub(super) fn contributed(
        &mut self,
        operator: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
    ) -> Value {
        let output = self.node(operator, inputs, attributes);
        if let Some(node) = self.graph.node.last_mut() {
            node.domain = Some(CONTRIBUTED.to_owned());
        }
        output
    }

    /// A node with `N` outputs.
    pub(super) fn nodes<const N: usize>(
        &mut self,
        operator: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
    ) -> [Value; N] {
        let name = format!("{}{operator}_{}", self.scope, self.graph.node.len());
        let outputs: [Value; N] = std::array::from_fn(|at| {
            if at == 0 {
                name.clone()
            } else {
                format!("{name}.{at}")
            }
        });
        self.graph.node.push(NodeProto {
            name: Some(name),
            op_type: Some(operator.to_owned()),
            input: inputs.iter().map(|&input| input.clone()).collect(),
            output: outputs.to_vec(),
            attribute: attributes,
            ..NodeProto::default()
        });
        outputs
    }

    /// A node with one output.
    pub(super) fn node(
        &mut self,
        operator: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
    ) -> Value {
        let [output] = self.nodes(operator, inputs, attributes);
        output
    }

    /// A stored tensor of the network, as float32; matrices may be kept as float16 and rounded by that.
    ///
    /// # Errors
    /// An entry that is not a number, or too large for the storage type.
    pub(super) fn weight(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Result<Value, ExportError> {
        if self.storage == Storage::F16 && shape.len() >= 2 {
            let stored = self.half_weight(name, shape, data)?;
            // A function of constants alone: the runtime evaluates it once, when it loads the graph.
            return Ok(self.float_of(&stored));
        }
        refuse_entries(name, data, f32::is_finite)?;
        Ok(self.floats(name, shape, data))
    }

    /// A stored tensor of the network, as float16.
    ///
    /// # Errors
    /// An entry that is not a number, or too large for float16.
    pub(super) fn half_weight(
        &mut self,
        name: &str,
        shape: &[usize],
        data: &[f32],
    ) -> Result<Value, ExportError> {
        refuse_entries(name, data, |x| f16::from_f32(x).is_finite())?;
        let stored = format!("{name}.f16");
        let halves = data.iter().map(|x| f16::from_f32(*x).to_le_bytes());
        self.store(&stored, DataType::Float16, shape, halves);
        Ok(stored)
    }

    /// `x W` for a float32 `x` `[.., inputs]` and a stored matrix of the shape `[inputs, outputs]`, in whole
    /// numbers.
    ///
    /// Each column of the matrix and each row of `x` is a signed byte times a step of its own. The rule of
    /// `DynamicQuantizeLinear` would be one step for all of `x`: canvases that share a batch would change
    /// each other's scores, and the error is two to three times as large.
    ///
    /// # Errors
    /// An entry that is not a number.
    pub(super) fn quantized_product(
        &mut self,
        x: &Value,
        name: &str,
        shape: &[usize],
        data: &[f32],
    ) -> Result<Value, ExportError> {
        refuse_entries(name, data, f32::is_finite)?;
        let outputs = shape.last().map_or(1, |&outputs| outputs.max(1));
        let mut steps = vec![0.0_f32; outputs];
        for row in data.chunks_exact(outputs) {
            for (step, x) in steps.iter_mut().zip(row) {
                *step = step.max(x.abs() / MAX_WEIGHT);
            }
        }
        steps.iter_mut().for_each(|step| *step = step.max(LEAST_STEP));
        let quantized = data
            .iter()
            .zip(steps.iter().cycle())
            .map(|(x, step)| ((x / step).round() as i8).to_le_bytes());
        let weight = format!("{name}.i8");
        self.store(&weight, DataType::Int8, shape, quantized);
        let weight_step = self.floats(&format!("{name}.step"), &[outputs], &steps);

        // The largest magnitude, without a copy of x: [.., 1].
        let last = self.ints(&[-1]);
        let part = self.float(1.0 / MAX_ACTIVATION);
        let largest = self.node("ReduceMax", &[x, &last], vec![]);
        let largest = self.node("Mul", &[&largest, &part], vec![]);
        let part = self.float(-1.0 / MAX_ACTIVATION);
        let least = self.node("ReduceMin", &[x, &last], vec![]);
        let least = self.node("Mul", &[&least, &part], vec![]);
        let floor = self.float(LEAST_STEP);
        let step = self.node("Max", &[&largest, &least, &floor], vec![]);
        let x = self.node("Div", &[x, &step], vec![]);
        let (one, zero) = (self.float(1.0), self.byte(ZERO_UINT8));
        let x = self.node("QuantizeLinear", &[&x, &one, &zero], vec![]);
        // One operator for the product and the steps of the columns: sums in whole numbers need not be written.
        let y = self.contributed(
            "MatMulIntegerToFloat",
            &[&x, &weight, &one, &weight_step, &zero],
            vec![],
        );
        Ok(self.node("Mul", &[&y, &step], vec![]))
    }

    /// `x` as float32.
    pub(super) fn float_of(&mut self, x: &Value) -> Value {
        self.node("Cast", &[x], vec![int("to", DataType::Float as i64)])
    }

    /// A stored float32 tensor.
    pub(super) fn floats(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Value {
        self.store(name, DataType::Float, shape, data.iter().map(|x| x.to_le_bytes()));
        name.to_owned()
    }

    /// A uint8 constant without axes.
    fn byte(&mut self, value: u8) -> Value {
        let name = format!("uint8 {value}");
        if self.constants.insert(name.clone()) {
            self.store(&name, DataType::Uint8, &[], [[value]].into_iter());
        }
        name
    }

    /// A float32 constant without axes.
    pub(super) fn float(&mut self, value: f32) -> Value {
        let name = format!("{value:?}");
        if self.constants.insert(name.clone()) {
            self.floats(&name, &[], &[value]);
        }
        name
    }

    /// An int64 constant with one axis.
    pub(super) fn ints(&mut self, values: &[i64]) -> Value {
        let name = format!("{values:?}");
        if self.constants.insert(name.clone()) {
            let entries = values.iter().map(|x| x.to_le_bytes());
            self.store(&name, DataType::Int64, &[values.len()], entries);
        }
        name
    }

    /// The graph, with `value`, which no node may read, as its only output under the name `name`.
    ///
    /// # Errors
    /// A tensor could not be written to its file.
    pub(super) fn finish(
        mut self,
        value: &Value,
        name: &str,
        element: DataType,
        shape: &[Axis],
    ) -> io::Result<GraphProto> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let outputs = self.graph.node.iter_mut().flat_map(|node| node.output.iter_mut());
        for output in outputs.filter(|output| *output == value) {
            name.clone_into(output);
        }
        self.graph.output.push(value_info(name, element, shape));
        Ok(self.graph)
    }

    fn store<const BYTES: usize>(
        &mut self,
        name: &str,
        element: DataType,
        shape: &[usize],
        entries: impl Iterator<Item = [u8; BYTES]>,
    ) {
        let mut tensor = TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(element as i32),
            dims: shape.iter().map(|&length| length as i64).collect(),
            ..TensorProto::default()
        };
        let bytes = shape.iter().product::<usize>() * BYTES;
        match &mut self.external {
            Some(file) if bytes >= SMALLEST_EXTERNAL => {
                tensor.data_location = Some(DataLocation::External as i32);
                match write_aligned(file, entries) {
                    Ok(offset) => tensor.external_data = place(file.name(), offset, bytes),
                    Err(error) => drop(self.failure.get_or_insert(error)),
                }
            }
            _ => tensor.raw_data = Some(entries.flatten().collect()),
        }
        self.graph.initializer.push(tensor);
    }
}

/// Appends a tensor to a file of many, and returns where it begins.
fn write_aligned<const BYTES: usize>(
    file: &mut BundleFile,
    mut entries: impl Iterator<Item = [u8; BYTES]>,
) -> io::Result<u64> {
    let offset = file.length().next_multiple_of(ALIGNMENT);
    let padding = (offset - file.length()) as usize;
    file.write_all(&[0; ALIGNMENT as usize][..padding])?;
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        chunk.extend(entries.by_ref().take(CHUNK / BYTES).flatten());
        if chunk.is_empty() {
            return Ok(offset);
        }
        file.write_all(&chunk)?;
    }
}

/// Where a tensor's data lies, as properties.
fn place(location: &str, offset: u64, length: usize) -> Vec<StringStringEntryProto> {
    let properties = [
        ("location", location.to_owned()),
        ("offset", offset.to_string()),
        ("length", length.to_string()),
    ];
    properties
        .into_iter()
        .map(|(key, value)| StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        })
        .collect()
}

fn refuse_entries(name: &str, data: &[f32], fits: impl Fn(f32) -> bool) -> Result<(), ExportError> {
    match data.iter().find(|x| !fits(**x)) {
        Some(&entry) => Err(ExportError::Entry {
            name: name.to_owned(),
            entry,
        }),
        None => Ok(()),
    }
}

/// Length of an axis of an input or output.
#[derive(Debug, Clone, Copy)]
pub(super) enum Axis {
    /// Known when the graph is written.
    Fixed(usize),
    /// Known when it runs; axes of the same name agree.
    Dynamic(&'static str),
}

fn value_info(name: &str, element: DataType, shape: &[Axis]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|axis| {
            let value = match *axis {
                Axis::Fixed(length) => Length::DimValue(length as i64),
                Axis::Dynamic(name) => Length::DimParam(name.to_owned()),
            };
            Dimension { value: Some(value) }
        })
        .collect();
    let tensor = TensorTypeProto {
        elem_type: Some(element as i32),
        shape: Some(TensorShapeProto { dim }),
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            tensor_type: Some(tensor),
        }),
    }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(kind as i32),
        ..AttributeProto::default()
    }
}

/// An integer attribute.
pub(super) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        i: Some(value),
        ..attribute(name, AttributeType::Int)
    }
}

/// An attribute that lists integers.
pub(super) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, AttributeType::Ints)
    }
}

/// A number.
pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        f: Some(value),
        ..attribute(name, AttributeType::Float)
    }
}

/// An attribute that names a choice.
pub(super) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        s: Some(value.as_bytes().to_vec()),
        ..attribute(name, AttributeType::String)
    }
}
