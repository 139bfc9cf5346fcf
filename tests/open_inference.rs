//! The Open Inference Protocol, spoken by Triton's own client and by hand.

use std::collections::HashMap;

use denoised::config::{Config, Who};
use denoised::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use denoised::proto::inference::infer_parameter::ParameterChoice;
use denoised::proto::inference::model_infer_request::InferInputTensor;
use denoised::proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
    RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest, ServerLiveRequest,
    ServerReadyRequest,
};
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{InfillRequest, ModelReference, Sampling, TemplatePart, TokenList};
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::Channel;

use crate::binary::{Serving, denoised};
use crate::support::{TestServer, closed_form, config, gap, infill, printed_by, publish, python};

const SOUND: &[u8] = include_bytes!("fixtures/networks/float32.onnx");
/// Positions of the network in [`SOUND`].
const LENGTH: i64 = 8;

fn speaking() -> Config {
    let mut config = config();
    config.server.open_inference = true;
    config
}

fn client(server: &TestServer) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(server.channel.clone())
}

/// A request for `tokens` of canvases of this length.
fn request(tokens: Vec<i64>, length: i64, parameters: &[(&str, ParameterChoice)]) -> ModelInferRequest {
    let named = parameters.iter().map(|(name, value)| {
        let parameter_choice = Some(value.clone());
        ((*name).to_owned(), InferParameter { parameter_choice })
    });
    ModelInferRequest {
        parameters: named.collect(),
        inputs: vec![InferInputTensor {
            name: "tokens".to_owned(),
            datatype: "INT64".to_owned(),
            shape: vec![tokens.len() as i64 / length, length],
            parameters: HashMap::new(),
            contents: Some(InferTensorContents {
                int64_contents: tokens,
                ..InferTensorContents::default()
            }),
        }],
        ..ModelInferRequest::default()
    }
}

#[test]
fn tritons_own_client_is_served_and_told_its_mistakes() {
    let Some(python) = python("python", "tritonclient.grpc") else {
        return;
    };
    let server = Serving::start_with(denoised().env("DENOISED__SERVER__OPEN_INFERENCE", "true"));
    let told = printed_by(&python, "triton.py", &server.address);
    let ready = ["live", "ready", "model_ready", "version_ready", "unknown_ready"].map(|what| &told[what]);
    assert_eq!(
        ready,
        [
            &json!(true),
            &json!(true),
            &json!(true),
            &json!(true),
            &json!(false)
        ]
    );
    assert_eq!(told["server"]["name"], "denoised");
    assert_eq!(told["server"]["version"], env!("CARGO_PKG_VERSION"));
    let tensor = |name: &str, datatype: &str, shape: Value| json!({"name": name, "datatype": datatype, "shape": shape});
    assert_eq!(
        told["metadata"],
        json!({
            "name": "world-english",
            "versions": ["1"],
            "platform": "denoised_absorbing",
            "inputs": [tensor("tokens", "INT64", json!(["-1", "-1"]))],
            "outputs": [
                tensor("tokens", "INT64", json!(["-1", "-1"])),
                tensor("log_probabilities", "FP32", json!(["-1", "-1"])),
                tensor("nfe", "INT64", json!(["-1"])),
            ],
        })
    );
    assert_eq!(
        told["index"],
        json!({"models": [{"name": "world-english", "version": "1", "state": "READY"}]})
    );
    assert_eq!(
        told["answer"],
        json!({"name": "world-english", "version": "1", "id": "mine", "seed": 5, "finished_early": false})
    );

    // What is clamped stays, what is not is filled; a canvas is the same wherever it stands in its tensor.
    let tokens: Vec<Vec<i64>> = serde_json::from_value(told["tokens"].clone()).unwrap();
    assert_eq!(
        tokens.iter().map(|canvas| canvas[0]).collect::<Vec<_>>(),
        [11, 12, 13]
    );
    assert_eq!(tokens[1][20..], [7, 7, 7, 7]);
    assert!(
        tokens.iter().flatten().all(|token| (0..6655).contains(token)),
        "{tokens:?}"
    );
    assert_eq!(told["again"], json!(tokens[1]));
    assert_eq!(told["again_outputs"], json!(["tokens"]));
    let log_probabilities: Vec<Vec<f64>> = serde_json::from_value(told["log_probabilities"].clone()).unwrap();
    assert!(
        log_probabilities
            .iter()
            .all(|canvas| canvas.len() == 24 && canvas[0] == 0.0 && canvas[1] < 0.0)
    );
    let nfe: Vec<u32> = serde_json::from_value(told["nfe"].clone()).unwrap();
    assert!(
        nfe.len() == 3 && nfe.iter().all(|nfe| (1..=9).contains(nfe)),
        "{nfe:?}"
    );

    // 128 positions take more evaluations than there is time for.
    assert_eq!(told["early"]["finished_early"], true);
    let early: Vec<Vec<i64>> = serde_json::from_value(told["early"]["tokens"].clone()).unwrap();
    assert!(early[0].iter().all(|token| (0..6655).contains(token)));

    for (what, says) in [
        ("model", "NOT_FOUND"),
        ("version", "INVALID_ARGUMENT: version: is \"new\""),
        ("length", "inputs[0].shape: is of 129 positions"),
        ("token", "inputs[0][0][1]: is 700000, must be below 6656"),
        ("nothing to fill", "inputs[0][0]: has no position to fill"),
        ("type", "inputs[0].datatype: is \"FP32\""),
        ("output", "outputs[0].name: is \"logits\", must be one of tokens"),
        ("parameter", "parameters[\"stepz\"]: is unknown"),
        ("steps", "sampling.steps: is 0"),
        ("priority", "parameters[\"priority\"]: is unknown"),
        ("load", "PERMISSION_DENIED"),
        ("unload", "PERMISSION_DENIED"),
        ("config", "parameters[\"config\"]: is unknown, there are none"),
        ("not ours", "UNIMPLEMENTED"),
    ] {
        let refusal = told["refused"][what].as_str().unwrap();
        assert!(refusal.contains(says), "{what}: {refusal}");
    }
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    // One line for all canvases of a call.
    let line = log
        .lines()
        .find(|line| line.contains("ModelInfer") && line.contains("canvases=3"))
        .expect(&log);
    let evaluations: u32 = nfe.iter().sum();
    assert!(
        line.contains(&format!("evaluations={evaluations} ")) && line.contains("done=3"),
        "{line}"
    );
}

/// Tensors are another form of templates, and nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_canvas_of_a_tensor_has_the_tokens_of_infill() {
    let server = TestServer::with_network(&speaking(), closed_form()).await;
    let mask = 5;
    // Masks and -1 mean the same; more parts than a template may have are no matter.
    let canvases = vec![
        1, mask, -1, 2, mask, mask, //
        -1, -1, -1, -1, 0, 3,
    ];
    let parameters = [
        ("seed", ParameterChoice::Int64Param(7)),
        ("steps", ParameterChoice::Uint64Param(6)),
        ("sampler", ParameterChoice::StringParam("euler".to_owned())),
    ];
    let mut asked = request(canvases, 6, &parameters);
    let answer = client(&server)
        .model_infer(asked.clone())
        .await
        .unwrap()
        .into_inner();
    let outputs: HashMap<_, _> = answer
        .outputs
        .iter()
        .map(|output| (output.name.as_str(), output))
        .collect();
    assert!(answer.raw_output_contents.is_empty());
    let tokens = &outputs["tokens"].contents.as_ref().unwrap().int64_contents;

    let clamped = |ids: &[u32]| Part::Tokens(TokenList { ids: ids.to_vec() });
    for (canvas, template) in [
        vec![clamped(&[1]), gap(2), clamped(&[2]), gap(2)],
        vec![gap(4), clamped(&[0, 3])],
    ]
    .into_iter()
    .enumerate()
    {
        let part = |part| TemplatePart { part: Some(part) };
        let wanted = InfillRequest {
            template: template.into_iter().map(part).collect(),
            sampling: Some(Sampling {
                seed: Some(7 + canvas as u64),
                steps: Some(6),
                sampler: Some(denoised::proto::v1::sampling::Sampler::Euler(
                    denoised::proto::v1::Euler::default(),
                )),
                ..Sampling::default()
            }),
            ..InfillRequest::default()
        };
        let result = infill(&mut server.client(), wanted)
            .await
            .unwrap()
            .results
            .remove(0);
        let own: Vec<u32> = tokens[6 * canvas..][..6]
            .iter()
            .map(|token| *token as u32)
            .collect();
        assert_eq!(own, result.tokens, "canvas {canvas}");
        let log_probabilities = &outputs["log_probabilities"]
            .contents
            .as_ref()
            .unwrap()
            .fp32_contents;
        assert_eq!(log_probabilities[6 * canvas..][..6], result.log_probabilities);
        let nfe = outputs["nfe"].contents.as_ref().unwrap().int64_contents[canvas];
        assert_eq!(nfe, i64::from(result.nfe));
    }

    // Who sends bytes gets bytes, of the same numbers.
    let contents = asked.inputs[0].contents.take().unwrap();
    let bytes = contents
        .int64_contents
        .iter()
        .flat_map(|token| token.to_le_bytes());
    asked.raw_input_contents = vec![bytes.collect()];
    let raw = client(&server)
        .model_infer(asked.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(raw.outputs.iter().all(|output| output.contents.is_none()));
    let (entries, rest) = raw.raw_output_contents[0].as_chunks();
    let entries: Vec<i64> = entries.iter().map(|entry| i64::from_le_bytes(*entry)).collect();
    assert_eq!((&entries, rest), (tokens, [].as_slice()));

    // Without a seed one is drawn, and told: it gives the same once more.
    asked.parameters.remove("seed");
    let drawn = client(&server)
        .model_infer(asked.clone())
        .await
        .unwrap()
        .into_inner();
    let told = drawn.parameters["seed"].clone();
    asked.parameters.insert("seed".to_owned(), told);
    let again = client(&server).model_infer(asked).await.unwrap().into_inner();
    assert_eq!(drawn.raw_output_contents, again.raw_output_contents);
    server.stop().await;
}

/// What makes a good request a bad one.
type Change = fn(&mut ModelInferRequest);

#[tokio::test(flavor = "multi_thread")]
async fn tensors_that_do_not_fit_are_refused_before_anything_is_built() {
    let mut config = speaking();
    config.limits.max_samples = 4;
    config.limits.max_request_tokens = 30;
    let server = TestServer::with_network(&config, closed_form()).await;
    let good = request(vec![-1; 12], 6, &[]);
    let cases: [(Change, &str); 15] = [
        (|r| r.inputs.clear(), "inputs: has 0 tensors"),
        (
            |r| r.inputs[0].name = "text".to_owned(),
            "inputs[0].name: is \"text\"",
        ),
        (
            |r| r.inputs[0].shape = vec![],
            "inputs[0].shape: has 0 dimensions",
        ),
        (
            |r| r.inputs[0].shape = vec![1, 2, 6],
            "inputs[0].shape: has 3 dimensions",
        ),
        (
            |r| r.inputs[0].shape = vec![-1, 6],
            "is of -1 canvases, must be of 1 to 4",
        ),
        (
            |r| r.inputs[0].shape = vec![5, 6],
            "is of 5 canvases, must be of 1 to 4",
        ),
        (
            |r| r.inputs[0].shape = vec![1, i64::MAX],
            "must be of 1 to 12 (the model's max_length)",
        ),
        (|r| r.inputs[0].shape = vec![4, 8], "more than the 30 positions"),
        (
            |r| r.inputs[0].shape = vec![2, 7],
            "inputs[0].contents: has 12 entries of type INT64",
        ),
        (
            |r| r.inputs[0].datatype = "INT32".to_owned(),
            "inputs[0].contents: has 0 entries",
        ),
        (|r| r.inputs[0].contents = None, "inputs[0].contents: is absent"),
        (
            |r| r.raw_input_contents = vec![vec![0; 96]],
            "must be absent beside raw_input_contents",
        ),
        (
            |r| {
                r.inputs[0].contents = None;
                r.raw_input_contents = vec![vec![255; 95]];
            },
            "raw_input_contents[0]: has 95 bytes",
        ),
        (
            |r| {
                let contents = r.inputs[0].contents.as_mut().unwrap();
                contents.int64_contents[7] = -2;
            },
            "inputs[0][1][1]: is -2, must be below 6",
        ),
        (|r| r.model_version = "-1".to_owned(), "model_version: is \"-1\""),
    ];
    for (change, says) in cases {
        let mut asked = good.clone();
        change(&mut asked);
        let refused = client(&server).model_infer(asked).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(says), "{says}: {refused}");
    }
    client(&server).model_infer(good).await.unwrap();
    server.stop().await;
}

/// The repository's calls do what the server's own do, for whom they may.
#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_loaded_and_unloaded() {
    let folder = tempfile::tempdir().unwrap();
    for version in [1, 2] {
        publish(folder.path(), ("live", version), SOUND, false);
    }
    std::fs::create_dir_all(folder.path().join("broken/1")).unwrap();
    std::fs::write(folder.path().join("broken/1/manifest.json"), "{").unwrap();
    let mut config = speaking();
    config.models.repository = Some(folder.path().to_owned().into());
    config.server.model_control = Who::Admins;
    config.models.default = Some("world-english".to_owned());
    let server = TestServer::demo_with(&config).await;
    let mut client = client(&server);

    let load = RepositoryModelLoadRequest {
        model_name: "live".to_owned(),
        ..RepositoryModelLoadRequest::default()
    };
    client.repository_model_load(load.clone()).await.unwrap();
    let ready = |version: &str| ModelReadyRequest {
        name: "live".to_owned(),
        version: version.to_owned(),
    };
    assert!(client.model_ready(ready("")).await.unwrap().into_inner().ready);
    assert!(!client.model_ready(ready("3")).await.unwrap().into_inner().ready);
    let index = async |client: &mut GrpcInferenceServiceClient<Channel>, ready| {
        let asked = RepositoryIndexRequest {
            repository_name: String::new(),
            ready,
        };
        let listed = client.repository_index(asked).await.unwrap().into_inner().models;
        let rows = listed
            .into_iter()
            .map(|model| (model.name, model.version, model.state, model.reason));
        rows.collect::<Vec<_>>()
    };
    let listed = index(&mut client, false).await;
    let of = |name: &str| -> Vec<(&str, &str)> {
        let own = listed.iter().filter(|(own, ..)| own == name);
        own.map(|(_, version, state, _)| (version.as_str(), state.as_str()))
            .collect()
    };
    assert_eq!(of("live").last(), Some(&("2", "READY")), "{listed:?}");
    assert_eq!(of("live").len(), 2);
    assert_eq!(of("broken"), [("1", "UNAVAILABLE")], "{listed:?}");
    assert!(
        listed
            .iter()
            .any(|(name, _, _, reason)| name == "broken" && !reason.is_empty())
    );
    assert!(
        index(&mut client, true)
            .await
            .iter()
            .all(|(.., state, _)| state == "READY")
    );

    let metadata = ModelMetadataRequest {
        name: "live".to_owned(),
        version: String::new(),
    };
    let versions = client
        .model_metadata(metadata)
        .await
        .unwrap()
        .into_inner()
        .versions;
    assert_eq!(versions, ["1", "2"]);
    let mut asked = request(vec![-1; LENGTH as usize], LENGTH, &[]);
    asked.model_name = "live".to_owned();
    asked.model_version = "1".to_owned();
    assert_eq!(
        client
            .model_infer(asked.clone())
            .await
            .unwrap()
            .into_inner()
            .model_version,
        "1"
    );

    let unload = RepositoryModelUnloadRequest {
        model_name: "live".to_owned(),
        ..RepositoryModelUnloadRequest::default()
    };
    client.repository_model_unload(unload).await.unwrap();
    let gone = client.model_infer(asked.clone()).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    client.repository_model_load(load).await.unwrap();
    client.model_infer(asked).await.unwrap();

    let elsewhere = RepositoryIndexRequest {
        repository_name: "other".to_owned(),
        ready: false,
    };
    let refused = client.repository_index(elsewhere).await.unwrap_err();
    assert!(refused.message().contains("repository_name"), "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_it_is_there_unless_it_is_switched_on() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let refused = client(&server)
        .server_live(ServerLiveRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
    server.stop().await;
}

/// Probes have no tokens; everything else needs one, and sees the models of its caller alone.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_hold_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let own = crate::tokens::token(&file, "own", "models = [\"another\"]");
    let mut config = speaking();
    config.server.tokens = Some(file);
    let server = TestServer::with_network(&config, closed_form()).await;
    let mut anonymous = client(&server);
    assert!(
        anonymous
            .server_live(ServerLiveRequest {})
            .await
            .unwrap()
            .into_inner()
            .live
    );
    assert!(
        anonymous
            .server_ready(ServerReadyRequest {})
            .await
            .unwrap()
            .into_inner()
            .ready
    );
    let asked = || request(vec![-1; 6], 6, &[]);
    let refused = anonymous.model_infer(asked()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    let bearer = denoised::client::Bearer::new(&own).unwrap();
    let mut known = GrpcInferenceServiceClient::with_interceptor(server.channel.clone(), bearer);
    let hidden = ModelReference {
        name: "closed-form".to_owned(),
        version: 1,
    };
    let ready = ModelReadyRequest {
        name: hidden.name.clone(),
        version: String::new(),
    };
    assert!(!known.model_ready(ready).await.unwrap().into_inner().ready);
    let mut other = asked();
    other.model_name = hidden.name;
    assert_eq!(known.model_infer(other).await.unwrap_err().code(), Code::NotFound);
    let listed = known
        .repository_index(RepositoryIndexRequest::default())
        .await
        .unwrap();
    assert!(listed.into_inner().models.is_empty());
    let load = RepositoryModelLoadRequest::default();
    assert_eq!(
        known.repository_model_load(load).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    server.stop().await;
}
