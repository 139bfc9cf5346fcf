//! Files of settings, however they were mangled.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::Config;
use crate::mutants::{Target, fuzz};

#[test]
fn settings() {
    let target = Target {
        name: "settings",
        sound: vec![
            include_bytes!("../../deploy/denoised.example.toml").to_vec(),
            b"[models]\nrepository = \"s3://bucket/models\"\ncache = \"/var/cache\"\npin = [\"a@1\"]\n".to_vec(),
            b"[engine]\ndevices = [\"cuda:0\", \"cpu\"]\nworkers = 2\n[traces]\nendpoint = \"http://here:4317\"\n"
                .to_vec(),
        ],
        words: &[
            b"[engine]\n",
            b"\"cuda:4294967296\"",
            b"\"gs://\"",
            b"\"\"\"",
            b"[[",
            b"nan",
            b"1979-05-27T07:32:00Z",
            b"= {a = ",
            b"\\u0000",
        ],
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("denoised.toml");
    fuzz!(target, |input: &[u8]| {
        std::fs::write(&file, input).unwrap();
        match Config::load_from(Some(&file), Some(std::collections::HashMap::new()), &[]) {
            Ok(config) => {
                assert!(config.engine.workers >= 1 && config.engine.threads() >= 1);
                assert!(config.engine.max_caller_share > 0.0 && config.engine.max_caller_share <= 1.0);
                assert!(!config.engine.devices.is_empty());
            }
            // Whoever starts the server is told in one line.
            Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
        }
    });
}
