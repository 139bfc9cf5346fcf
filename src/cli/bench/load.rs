//! Sends requests when they are due, and takes their times.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::Code;

use super::mix::Mix;
use crate::client::{Client, Event, Request, Retry};

/// Requests that may be under way at once where they come at a rate: more are not sent, and counted.
const MOST_OPEN: usize = 10_000;

/// When requests are due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arrivals {
    /// At random times, so many a second on the mean.
    Open { rate: f64 },
    /// Each of so many when the one before it has ended.
    Closed { streams: u32 },
}

/// A load, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) arrivals: Arrivals,
    /// Before anything is counted.
    pub(super) warm_up: Duration,
    pub(super) measured: Duration,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    /// When it was due, from the start of the load.
    pub(super) due: Duration,
    /// From then to the first frame, if one came.
    pub(super) first_frame: Option<Duration>,
    /// From then to its end.
    pub(super) whole: Duration,
    pub(super) code: Code,
    pub(super) canvases: u64,
    pub(super) evaluations: u64,
    /// Tokens that the network filled in.
    pub(super) tokens: u64,
}

/// What came of a load.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Requests that were due after the warm-up.
    pub(super) ended: Vec<Ended>,
    /// Requests that were due and not sent, because too many were open.
    pub(super) not_sent: u64,
}

impl Load {
    /// Sends requests of `mix` until the time is over, and waits for those under way.
    pub(super) async fn run(&self, client: Client, mix: Mix) -> Outcome {
        // A request that goes on elsewhere would hide that its server went away.
        let client = client.with_retry(Retry::NEVER);
        let (mut ended, not_sent) = match self.arrivals {
            Arrivals::Open { rate } => self.open(client, mix, rate).await,
            Arrivals::Closed { streams } => (self.closed(&client, &mix, streams).await, 0),
        };
        ended.retain(|request| request.due >= self.warm_up);
        Outcome { ended, not_sent }
    }

    fn end(&self) -> Duration {
        self.warm_up + self.measured
    }

    async fn closed(&self, client: &Client, mix: &Mix, streams: u32) -> Vec<Ended> {
        let (started, sent) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for stream in 0..streams {
            let (client, mix, sent, end) = (client.clone(), mix.clone(), Arc::clone(&sent), self.end());
            tasks.spawn(async move {
                let mut random = ChaCha8Rng::seed_from_u64(stream.into());
                let mut all = Vec::new();
                loop {
                    let due = started.elapsed();
                    let number = sent.fetch_add(1, Ordering::Relaxed);
                    let Some(request) = mix.request(uniform(&mut random), number).filter(|_| due < end)
                    else {
                        return all;
                    };
                    all.push(follow(&client, request, started, due).await);
                }
            });
        }
        tasks.join_all().await.into_iter().flatten().collect()
    }

    async fn open(&self, client: Client, mix: Mix, rate: f64) -> (Vec<Ended>, u64) {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let (started, places) = (Instant::now(), Arc::new(Semaphore::new(MOST_OPEN)));
        let (mut tasks, mut all) = (JoinSet::new(), Vec::new());
        let (mut due, mut not_sent) = (Duration::ZERO, 0);
        for number in 0.. {
            // Exponential: 1 - u is above 0.
            due += Duration::from_secs_f64(-(1.0 - uniform(&mut random)).ln() / rate);
            let Some(request) = mix
                .request(uniform(&mut random), number)
                .filter(|_| due < self.end())
            else {
                break;
            };
            tokio::time::sleep_until((started + due).into()).await;
            while let Some(ended) = tasks.try_join_next() {
                all.extend(ended);
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                not_sent += u64::from(due >= self.warm_up);
                continue;
            };
            let client = client.clone();
            tasks.spawn(async move {
                let _place = place;
                follow(&client, request, started, due).await
            });
        }
        all.extend(tasks.join_all().await);
        (all, not_sent)
    }
}

/// In [0, 1).
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

async fn follow(client: &Client, request: Request, started: Instant, due: Duration) -> Ended {
    let mut ended = Ended {
        due,
        first_frame: None,
        whole: Duration::ZERO,
        code: Code::Ok,
        canvases: 0,
        evaluations: 0,
        tokens: 0,
    };
    let since = || started.elapsed().saturating_sub(due);
    let mut events = client.run(request);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Frame(_)) => {
                ended.first_frame.get_or_insert_with(since);
            }
            Ok(Event::Result(result)) => {
                ended.canvases += 1;
                ended.evaluations += u64::from(result.nfe);
                ended.tokens += result.committed_at.iter().filter(|step| **step > 0).count() as u64;
            }
            Ok(Event::Accepted(_) | Event::Resumed(_)) => {}
            Err(status) => ended.code = status.code(),
        }
    }
    ended.whole = since();
    ended
}
