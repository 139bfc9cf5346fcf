//! The Rust client's own balancing: calls go to all servers that serve, and to none that does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use denoised::client::{Client, Event, Request, balanced, over, watched};
use denoised::proto::v1::GenerateRequest;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::binary::{Serving, denoised};
use crate::plain_http::{get, value};
use crate::rolling::free_address;
use crate::support::{TestServer, closed_form, config, generate};

/// Calls that are counted.
const CALLS: usize = 600;

fn channel(addresses: watch::Receiver<Vec<SocketAddr>>) -> Channel {
    over(addresses, |address| {
        Ok(watched(Endpoint::from_shared(format!("http://{address}"))?))
    })
}

fn address(server: &TestServer) -> SocketAddr {
    server.url.trim_start_matches("http://").parse().unwrap()
}

/// Calls that a server has answered.
async fn answered(server: &TestServer) -> f64 {
    let (_, _, metrics) = get(&server.url, "/metrics").await;
    value(&metrics, "denoised_calls_total{method=\"Generate\",code=\"OK\"}").unwrap_or(0.0)
}

/// Calls until `reached`; every call has to be answered.
async fn until(client: &DiffusionServiceClient<Channel>, what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let calling = async {
        while !reached().await {
            generate(&mut client.clone(), GenerateRequest::default())
                .await
                .unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), calling)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_to_all_servers_that_serve() {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(TestServer::with_network(&config(), closed_form()).await);
    }
    let all: Vec<SocketAddr> = servers.iter().map(address).collect();
    let (tell, addresses) = watch::channel(all.clone());
    let spread = channel(addresses);
    let client = DiffusionServiceClient::new(spread.clone());
    let counts = async |servers: &[TestServer]| {
        let mut counts = Vec::new();
        for server in servers {
            counts.push(answered(server).await);
        }
        counts
    };
    until(&client, "each has answered", async || {
        counts(&servers).await.iter().all(|count| *count > 0.0)
    })
    .await;
    let before = counts(&servers).await;
    for _ in 0..CALLS {
        generate(&mut client.clone(), GenerateRequest::default())
            .await
            .unwrap();
    }
    // Of 600 each expects 200, with a standard deviation of 11.5: within 20 % is 3.5 of these.
    let told = async {
        loop {
            let now = counts(&servers).await;
            let own: Vec<f64> = now
                .iter()
                .zip(&before)
                .map(|(now, before)| now - before)
                .collect();
            if own.iter().sum::<f64>() >= CALLS as f64 {
                return own;
            }
        }
    };
    let own = tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
    assert!(own.iter().all(|count| (160.0..=240.0).contains(count)), "{own:?}");

    // One leaves the name, and is asked no more while it still serves.
    tell.send(all[1..].to_vec()).unwrap();
    let mut quiet = answered(&servers[0]).await;
    until(&client, "the one that left is left alone", async || {
        let before = std::mem::replace(&mut quiet, answered(&servers[0]).await);
        let others = counts(&servers[1..]).await;
        for _ in 0..20 {
            generate(&mut client.clone(), GenerateRequest::default())
                .await
                .unwrap();
        }
        before == quiet && answered(&servers[0]).await == quiet && counts(&servers[1..]).await != others
    })
    .await;
    // One shuts down, and nobody who resumes notices: what it refuses before its health is known goes elsewhere.
    let calls = Arc::new(AtomicUsize::new(0));
    let (counted, caller) = (Arc::clone(&calls), Client::of([spread.clone()]));
    let calling = tokio::spawn(async move {
        while counted.fetch_add(1, Ordering::AcqRel) < 1_000_000 {
            let mut events = caller.run(Request::from(GenerateRequest::default()));
            while let Some(event) = events.next().await {
                event?;
            }
        }
        Ok::<_, tonic::Status>(())
    });
    let last = servers.pop().unwrap();
    let reached = calls.load(Ordering::Acquire) + 20;
    while calls.load(Ordering::Acquire) < reached {
        tokio::task::yield_now().await;
    }
    last.stop().await;
    let reached = calls.load(Ordering::Acquire) + 100;
    while calls.load(Ordering::Acquire) < reached && !calling.is_finished() {
        tokio::task::yield_now().await;
    }
    assert!(!calling.is_finished(), "a call failed: {:?}", calling.await);
    calling.abort();
    for server in servers {
        server.stop().await;
    }
}

/// A server that is killed takes its streams with it; they go on elsewhere, and it is asked again when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_elsewhere_when_a_server_is_killed_and_it_comes_back() {
    let all: Vec<String> = (0..3).map(|_| free_address()).collect();
    let start = |address: &str| Serving::start_at(&mut denoised(), address);
    let mut servers: Vec<Serving> = all.iter().map(|address| start(address)).collect();
    let parsed = all.iter().map(|address| address.parse().unwrap()).collect();
    let (_tell, addresses) = watch::channel(parsed);
    let channel = channel(addresses);
    let client = Client::of([channel.clone()]);
    let streams: Vec<_> = (0..9)
        .map(|seed| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut texts = Vec::new();
                for _ in 0..3 {
                    let request = Request::continuing("In the beginning")
                        .length(64)
                        .steps(48)
                        .seed(seed);
                    let mut events = client.run(request);
                    while let Some(event) = events.next().await {
                        if let Event::Result(result) = event.unwrap() {
                            texts.push(result.text().to_owned());
                        }
                    }
                }
                texts
            })
        })
        .collect();
    // Somewhere in the middle.
    let busy = async |address: &str| {
        let running = async {
            while value(
                &get(&format!("http://{address}"), "/metrics").await.2,
                "denoised_running_requests",
            ) < Some(1.0)
            {}
        };
        tokio::time::timeout(Duration::from_secs(60), running)
            .await
            .unwrap();
    };
    busy(&all[0]).await;
    servers.remove(0).signal("KILL");
    for stream in streams {
        let texts = stream.await.unwrap();
        assert!(
            texts.len() == 3 && texts.iter().all(|text| *text == texts[0]),
            "{texts:?}"
        );
    }
    servers.push(start(&all[0]));
    let mut caller = DiffusionServiceClient::new(channel);
    let back = async {
        let done = "denoised_calls_total{method=\"Generate\",code=\"OK\"}";
        let url = format!("http://{}", all[0]);
        while value(&get(&url, "/metrics").await.2, done) < Some(1.0) {
            let short = GenerateRequest {
                length: Some(8),
                ..GenerateRequest::default()
            };
            generate(&mut caller, short).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), back).await.unwrap();
    for server in servers {
        server.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_looked_up() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let url = format!("http://localhost:{}", address(&server).port());
    let mut client = DiffusionServiceClient::new(balanced(&url).unwrap());
    let asked = generate(&mut client, GenerateRequest::default());
    tokio::time::timeout(Duration::from_secs(20), asked)
        .await
        .unwrap()
        .unwrap();
    for wrong in ["denoised", "http://", "http:///models"] {
        assert!(
            balanced(wrong).unwrap_err().to_string().contains(wrong),
            "{wrong}"
        );
    }
    server.stop().await;
}
