//! The demo model, trained by this repository and compiled into the binary.

use super::{Bundle, BundleError};

#[cfg(feature = "demo-model")]
macro_rules! demo_file {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!("../../training/demo/world-english/1/", $name)).as_slice(),
        )
    };
}

#[cfg(feature = "demo-model")]
static DEMO: &[(&str, &[u8])] = &[
    demo_file!("manifest.json"),
    demo_file!("model.onnx"),
    demo_file!("tokenizer.json"),
];

/// The embedded demo model, if this binary was built with the feature `demo-model`.
pub fn demo() -> Option<Result<Bundle, BundleError>> {
    #[cfg(feature = "demo-model")]
    let demo = Some(Bundle::embedded(DEMO));
    #[cfg(not(feature = "demo-model"))]
    let demo = None;
    demo
}
