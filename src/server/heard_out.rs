//! What a call still has to say when it is answered.
//!
//! A call can be answered before it has been heard out: its method does not exist, its token is unknown, its message is
//! no message. HTTP/2 would reset its stream then and forget it, and take what comes for the stream after that as an
//! error of the connection's other side; after a thousand of these it ends the connection, with the calls of all others
//! that share it, as they do behind a gateway. So whatever is left is heard, as much as there may be of it.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tonic::codegen::Bytes;

/// Bytes that are heard in vain, and for how long: the stream counts as open meanwhile.
const MOST: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

/// The body of a request, which is heard out when nobody wants the rest of it.
#[derive(Debug)]
pub(super) struct HeardOut(Option<Incoming>);

impl HeardOut {
    pub(super) fn new(body: Incoming) -> Self {
        Self(Some(body))
    }
}

impl Body for HeardOut {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map(Incoming::size_hint).unwrap_or_default()
    }
}

impl Drop for HeardOut {
    fn drop(&mut self) {
        let rest = self.0.take().filter(|body| !body.is_end_stream());
        // Without a runtime the server is gone, and the connection with it.
        if let (Some(body), Ok(runtime)) = (rest, Handle::try_current()) {
            runtime.spawn(tokio::time::timeout(PATIENCE, hear_out(body)));
        }
    }
}

/// Ends with the body, when it is more than there may be, or when the call is taken back.
async fn hear_out(mut body: Incoming) {
    let mut heard = 0;
    while let Some(Ok(frame)) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        heard += frame.data_ref().map_or(0, Bytes::len);
        if heard > MOST {
            return;
        }
    }
}
