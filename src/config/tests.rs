//! What may be set, in which order, and what is said of mistakes.

use super::*;

fn load(toml: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("denoised.toml");
    std::fs::write(&path, toml).unwrap();
    let environment = environment
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    let flags: Vec<_> = flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
    Config::load_from(Some(&path), Some(environment), &flags)
}

#[test]
fn flags_beat_the_environment_beats_the_file_beats_defaults() {
    let file = "[engine]\nworkers = 2\nbatch_tokens = 7\n[server]\nlisten = \"127.0.0.1:1\"";
    let environment = [
        ("DENOISED__ENGINE__WORKERS", "3"),
        ("DENOISED__SERVER__LISTEN", "127.0.0.1:2"),
    ];
    let config = load(file, &environment, &[("server.listen", "127.0.0.1:3")]).unwrap();
    assert_eq!(config.engine.batch_tokens, 7);
    assert_eq!(config.engine.workers, 3);
    assert_eq!(config.server.listen.port(), 3);
    assert_eq!(config.limits, LimitsConfig::default());
}

#[test]
fn pins_are_a_list_or_a_line() {
    let pins = |toml: &str, variable: &str| {
        let environment = [("DENOISED__MODELS__PIN", variable)];
        let environment = if variable.is_empty() {
            &[]
        } else {
            &environment[..]
        };
        load(toml, environment, &[]).unwrap().models.pin
    };
    let file = "[models]\npin = [\"a@1\", \"b@2\"]";
    assert_eq!(pins(file, ""), ["a@1", "b@2"]);
    assert_eq!(pins(file, "c@3, d@4"), ["c@3", "d@4"]);
    assert!(pins("", "").is_empty() && pins("", " ").is_empty());
}

#[test]
fn mistakes_are_named() {
    for (toml, says) in [
        ("[engine]\nworker = 2", "worker"),
        ("[engine]\nworkers = 0", "engine.workers"),
        ("[engine]\nworkers = \"many\"", "workers"),
        ("[engine]\ndevice = \"tpu\"", "tpu"),
        ("[limits]\nmax_steps = 0", "limits.max_steps"),
        ("[server]\nlisten = \"everywhere\"", "listen"),
        ("[log]\nformat = \"xml\"", "xml"),
        ("[engine\nworkers = 2", "line 1 ([engine)"),
        ("[engine]\n\nworkers = \"2\"", "line 3 (workers = \"2\")"),
        ("[engine]\nworkers = -1", "0 or more"),
        ("[engine]\nthreads_per_worker = 2000", "0 to 1024"),
        ("[engin]\nworkers = 1", "engin"),
        ("[server]\ndrain_grace_seconds = 1.5", "drain_grace_seconds"),
        ("[server]\ndrain_grace_seconds = 100000", "at most 86400"),
        ("[server]\ntls_certificate = \"a.pem\"", "server.tls_key is empty"),
        ("[server]\ntls_key = \"a.key\"", "server.tls_key is a.key"),
        ("[server]\ntls_client_ca = \"a.pem\"", "server.tls_client_ca"),
        (
            "[models]\nrepository = \"s3://bucket/models\"",
            "models.cache is empty",
        ),
        ("[models]\ncache = \"/tmp/cache\"", "models.cache is /tmp/cache"),
        ("[models]\ncache_megabytes = 0", "models.cache_megabytes"),
        ("[server]\nmetrics = \"some\"", "admins"),
        (
            "[server]\nmodel_control = \"everybody\"",
            "nobody, admins or callers",
        ),
        ("[traces]\nendpoint = \"collector:4317\"", "traces.endpoint"),
        ("[traces]\nshare = 1.5", "traces.share"),
        (
            "[models]\nrepository = \"ftp://host/models\"",
            "s3://, gs://, az://",
        ),
        ("[models]\nrepository = \"s3://\"", "s3://"),
    ] {
        let error = load(toml, &[], &[]).unwrap_err().to_string();
        assert!(error.contains(says), "{toml}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn mistakes_in_variables_are_named() {
    for (variable, value, says) in [
        ("DENOISED__ENGINE__WORKERS", "many", "engine.workers"),
        ("DENOISED__ENGINE__WORKERS", "1.5", "engine.workers"),
        ("DENOISED__ENGINE__WORKER", "1", "worker"),
        ("DENOISED__ENGIN__WORKERS", "1", "engin"),
        ("DENOISED__SERVER__LISTEN", "", "server.listen"),
        ("DENOISED__LIMITS__MAX_STEPS", "0", "limits.max_steps"),
    ] {
        let error = load("", &[(variable, value)], &[]).unwrap_err().to_string();
        assert!(error.contains(says), "{variable}={value}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn variables_keep_their_text_and_others_are_left_alone() {
    let environment = [
        ("DENOISED__MODELS__DEFAULT", "007"),
        ("DENOISED__MODELS__DEMO", "false"),
        ("DENOISED__ENGINE__DEVICE", "cuda:1"),
        // What an orchestrator tells about a service called denoised.
        ("DENOISED_SERVICE_HOST", "10.0.0.1"),
        ("DENOISED_SERVER", "http://10.0.0.1:50051"),
    ];
    let config = load("", &environment, &[]).unwrap();
    assert_eq!(config.models.default.as_deref(), Some("007"));
    assert!(!config.models.demo);
    assert_eq!(config.engine.devices, [Device::Cuda(1)]);
}

#[test]
fn devices_are_a_list_or_a_line_and_never_none() {
    let devices = |file: &str| load(file, &[], &[]).map(|config| config.engine.devices);
    let two = [Device::Cuda(0), Device::Cuda(1)];
    assert_eq!(
        devices("[engine]\ndevices = [\"cuda:0\", \"cuda:1\"]").unwrap(),
        two
    );
    assert_eq!(devices("[engine]\ndevices = \"cuda:0, cuda:1\"").unwrap(), two);
    assert_eq!(devices("[engine]\ndevice = \"cpu\"").unwrap(), [Device::Cpu]);
    for (bad, why) in [
        ("[]", "1 to 64"),
        ("\"\"", "must be"),
        ("[\"cpu\", \"tpu\"]", "tpu"),
    ] {
        let refused = devices(&format!("[engine]\ndevices = {bad}"))
            .unwrap_err()
            .to_string();
        assert!(refused.contains(why), "{refused}");
    }
}

const EXAMPLE: &str = include_str!("../../deploy/denoised.example.toml");

#[test]
fn the_example_states_the_defaults() {
    assert_eq!(load(EXAMPLE, &[], &[]).unwrap(), Config::default());
}

/// Every field of the structs above appears in the example: Debug prints them all.
#[test]
fn the_example_documents_every_key() {
    let example: toml::Table = toml::from_str(EXAMPLE).unwrap();
    let documented: usize = example
        .values()
        .map(|section| section.as_table().unwrap().len())
        .sum();
    let fields = format!("{:?}", Config::default()).matches(": ").count() - example.len();
    assert_eq!(documented, fields);
    for (section, keys) in &example {
        for key in keys.as_table().unwrap().keys() {
            let variable = format!("DENOISED__{}__{}", section.to_uppercase(), key.to_uppercase());
            assert!(EXAMPLE.contains(&variable), "{variable} is not mentioned");
        }
    }
}
