//! What an endpoint picker makes of our metrics: the scorers of the Gateway API Inference Extension, replayed with the
//! configuration that the chart gives it.

use std::collections::HashMap;

use denoised::proto::v1::{GenerateRequest, Sampling};

use crate::errors::busy_server;
use crate::plain_http::{get, value};

const CONFIGURATION: &str = include_str!("../deploy/chart/templates/inferencepool.yaml");

/// The value of the line `key: value` in the picker's configuration.
fn configured(key: &str) -> &'static str {
    let lines = CONFIGURATION.lines();
    let mut values = lines.filter_map(|line| line.trim_start().strip_prefix(key)?.strip_prefix(": "));
    values.next().unwrap_or_else(|| panic!("{key} is not configured"))
}

/// The weight of a scorer.
fn weight(scorer: &str) -> f64 {
    let (_, after) = CONFIGURATION
        .split_once(&format!("pluginRef: {scorer}\n"))
        .unwrap();
    let line = after.lines().next().unwrap().trim();
    line.strip_prefix("weight: ").unwrap().parse().unwrap()
}

/// What the extractor reads of one server: queued requests, and the share that stands in the place of the KV cache's.
fn read(metrics: &str) -> (f64, f64) {
    let read = |key| value(metrics, configured(key)).unwrap();
    assert!(read("runningRequestsSpec") >= read("queuedRequestsSpec"));
    (read("queuedRequestsSpec"), read("kvUsageSpec"))
}

/// The weighted sum of scores of each server. The queue's scorer gives the shortest queue 1 and the longest 0, all of them 1
/// where they are equal; that of the cache gives what is free.
fn scores(servers: &[(f64, f64)]) -> Vec<f64> {
    let queues = || servers.iter().map(|(queued, _)| *queued);
    let (shortest, longest) = (
        queues().fold(f64::INFINITY, f64::min),
        queues().fold(0.0, f64::max),
    );
    let score = |(queued, used): &(f64, f64)| {
        let queue = if shortest < longest {
            (longest - queued) / (longest - shortest)
        } else {
            1.0
        };
        weight("queue-scorer") * queue + weight("kv-cache-utilization-scorer") * (1.0 - used)
    };
    servers.iter().map(score).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_picker_prefers_the_server_with_the_least_work() {
    let (mut servers, mut streams, mut metrics) = (Vec::new(), Vec::new(), Vec::new());
    for (requests, steps) in [(0, 0), (4, 4), (1, 4000)] {
        let (server, gate) = busy_server(60, 1.0).await;
        for _ in 0..requests {
            let asked = GenerateRequest {
                sampling: Some(Sampling {
                    steps: Some(steps),
                    ..Sampling::default()
                }),
                ..GenerateRequest::default()
            };
            let mut stream = server.client().generate(asked).await.unwrap().into_inner();
            stream.message().await.unwrap();
            streams.push(stream);
        }
        metrics.push(get(&server.url, "/metrics").await.2);
        servers.push((server, gate));
    }
    let read: Vec<(f64, f64)> = metrics.iter().map(|metrics| read(metrics)).collect();
    let queued: Vec<f64> = read.iter().map(|(queued, _)| *queued).collect();
    assert_eq!(queued, [0.0, 4.0, 1.0]);
    // One long request is more work than four short ones.
    let used: HashMap<&str, f64> = ["idle", "short", "long"]
        .into_iter()
        .zip(read.iter().map(|(_, used)| *used))
        .collect();
    assert!(used["idle"] == 0.0 && used["short"] > 0.0, "{used:?}");
    assert!(
        used["long"] > 100.0 * used["short"] && used["long"] <= 1.0,
        "{used:?}"
    );

    let all = scores(&read);
    assert!(
        all[0] > all[1] && all[0] > all[2],
        "an idle server is the first: {all:?}"
    );
    // Beside a server that is as good as full even a longer queue of short requests is the better place.
    let full = scores(&[read[1], (1.0, 1.0)]);
    assert!(full[0] > full[1], "{full:?}");
    drop(streams);
    for (server, gate) in servers {
        gate.open();
        server.stop().await;
    }
}
