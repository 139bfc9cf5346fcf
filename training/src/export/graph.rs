//! Writes ONNX graphs: nodes and stored tensors in, one `GraphProto` out.
//!
//! Knows the file format and nothing of the network.

use std::collections::BTreeSet;

use half::f16;

use super::onnx::tensor_proto::DataType;
use super::onnx::tensor_shape_proto::{Dimension, dimension};
use super::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto, type_proto,
};
use super::{ExportError, Storage};

/// Name of a tensor in the graph.
pub(super) type Value = String;

/// A graph under construction; nodes run in the order in which they are added.
#[derive(Debug)]
pub(super) struct Builder {
    storage: Storage,
    scope: String,
    graph: GraphProto,
    constants: BTreeSet<String>,
}

impl Builder {
    /// An empty graph called `name`, whose matrices are kept as `storage`.
    pub(super) fn new(name: &str, storage: Storage) -> Self {
        let graph = GraphProto {
            name: Some(name.to_owned()),
            ..GraphProto::default()
        };
        Self {
            storage,
            scope: String::new(),
            graph,
            constants: BTreeSet::new(),
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

    /// A stored tensor of the network; matrices are kept in the storage type and read as float32.
    ///
    /// # Errors
    /// An entry that is not a number, or too large for the storage type.
    pub(super) fn weight(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Result<Value, ExportError> {
        let half = self.storage == Storage::F16 && shape.len() >= 2;
        let fits = |x: &f32| {
            if half {
                f16::from_f32(*x).is_finite()
            } else {
                x.is_finite()
            }
        };
        if let Some(&entry) = data.iter().find(|x| !fits(x)) {
            return Err(ExportError::Entry {
                name: name.to_owned(),
                entry,
            });
        }
        if !half {
            return Ok(self.floats(name, shape, data));
        }
        let stored = format!("{name}.f16");
        let bytes = data
            .iter()
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect();
        self.store(&stored, DataType::Float16, shape, bytes);
        // A function of constants alone: the runtime evaluates it once, when it loads the graph.
        Ok(self.node("Cast", &[&stored], vec![int("to", DataType::Float as i64)]))
    }

    /// A stored float32 tensor.
    pub(super) fn floats(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Value {
        self.store(
            name,
            DataType::Float,
            shape,
            data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        );
        name.to_owned()
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
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.store(&name, DataType::Int64, &[values.len()], bytes);
        }
        name
    }

    /// The graph, with `value`, which no node may read, as its only output under the name `name`.
    pub(super) fn finish(
        mut self,
        value: &Value,
        name: &str,
        element: DataType,
        shape: &[Axis],
    ) -> GraphProto {
        let outputs = self.graph.node.iter_mut().flat_map(|node| node.output.iter_mut());
        for output in outputs.filter(|output| *output == value) {
            name.clone_into(output);
        }
        self.graph.output.push(value_info(name, element, shape));
        self.graph
    }

    fn store(&mut self, name: &str, element: DataType, shape: &[usize], raw_data: Vec<u8>) {
        self.graph.initializer.push(TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(element as i32),
            dims: shape.iter().map(|&length| length as i64).collect(),
            raw_data: Some(raw_data),
            ..TensorProto::default()
        });
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
                Axis::Fixed(length) => dimension::Value::DimValue(length as i64),
                Axis::Dynamic(name) => dimension::Value::DimParam(name.to_owned()),
            };
            Dimension {
                value: Some(value),
                ..Dimension::default()
            }
        })
        .collect();
    let tensor = type_proto::Tensor {
        elem_type: Some(element as i32),
        shape: Some(TensorShapeProto { dim }),
    };
    let r#type = TypeProto {
        value: Some(type_proto::Value::TensorType(tensor)),
        ..TypeProto::default()
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(r#type),
        ..ValueInfoProto::default()
    }
}

fn attribute(name: &str, kind: attribute_proto::AttributeType) -> AttributeProto {
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
        ..attribute(name, attribute_proto::AttributeType::Int)
    }
}

/// An attribute that lists integers.
pub(super) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, attribute_proto::AttributeType::Ints)
    }
}

/// A number.
pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        f: Some(value),
        ..attribute(name, attribute_proto::AttributeType::Float)
    }
}

/// An attribute that names a choice.
pub(super) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        s: Some(value.as_bytes().to_vec()),
        ..attribute(name, attribute_proto::AttributeType::String)
    }
}
