//! Connections that do not speak, or are too many, take nothing from those that do.

use std::time::Duration;

use denoised::proto::v1::ListModelsRequest;
use denoised::proto::v1::model_service_client::ModelServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;

use crate::support::{TestServer, closed_form, config};

/// Waits until the server has closed `socket`.
async fn closes(mut socket: TcpStream) {
    let closed = async { while socket.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(Duration::from_secs(20), closed)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_says_nothing_or_something_else_is_closed() {
    let mut config = config();
    config.server.handshake_seconds = 1;
    let server = TestServer::with_network(&config, closed_form()).await;
    let address = server.url.trim_start_matches("http://").to_owned();
    for said in ["", "PRI * HT", "GET / HTTP/1.1\r\n\r\n"] {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        socket.write_all(said.as_bytes()).await.unwrap();
        closes(socket).await;
    }
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_and_a_free_place_is_used() {
    let mut config = config();
    config.server.max_connections = 2;
    let server = TestServer::with_network(&config, closed_form()).await;
    let address = server.url.trim_start_matches("http://").to_owned();
    // The server's own client has one place, this the other.
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    let second = TcpStream::connect(&address).await.unwrap();
    // Which of them was accepted first the server alone knows; a third is closed whatever that was.
    closes(TcpStream::connect(&address).await.unwrap()).await;
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    drop(second);
    let answered = async {
        loop {
            let channel = Channel::from_shared(server.url.clone()).unwrap().connect().await;
            if let Ok(channel) = channel
                && let Ok(answer) = ModelServiceClient::new(channel)
                    .list_models(ListModelsRequest {})
                    .await
            {
                return answer;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), answered)
        .await
        .unwrap();
    server.stop().await;
}
