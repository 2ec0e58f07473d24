//! Tells a client's own server that its job is over: the public payload, three tries. Never logs an address, which may
//! hold a key.

use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::settings::PostWebhook;
use super::wire::{JobState, WebhookPayload};
use crate::error::ErrorClass;

const TRIES: usize = 3;
/// For one try, whatever the one who posts allows itself.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Posts at the same time; the others wait.
static POSTS: Semaphore = Semaphore::const_new(32);

pub(super) struct Webhook<'a> {
    pub(super) url: &'a str,
    pub(super) state: &'a JobState,
    pub(super) input: &'a RawValue,
}

impl Webhook<'_> {
    /// Whether it was taken. When the server stops, the tries that are left follow at once.
    pub(super) async fn deliver(
        &self,
        post: &PostWebhook,
        pause: Duration,
        mut closing: watch::Receiver<bool>,
    ) -> bool {
        let id = &self.state.id;
        for attempt in 1..=TRIES {
            let answer = {
                let _permit = POSTS.acquire().await;
                timeout(TIMEOUT, post(self.url.to_owned(), self.payload())).await
            };
            match answer {
                Ok(Ok(200..=299)) => return true,
                Ok(Ok(status)) => tracing::warn!(job = %id, attempt, status, "a webhook was not taken"),
                Ok(Err(error)) => {
                    tracing::warn!(job = %id, attempt, code = error.code, "a webhook could not be posted");
                    if error.class == ErrorClass::InvalidInput {
                        return false;
                    }
                }
                Err(_) => tracing::warn!(job = %id, attempt, "a webhook was not answered"),
            }
            if attempt < TRIES {
                tokio::select! {
                    () = sleep(pause) => {}
                    _ = closing.wait_for(|closing| *closing) => {}
                }
            }
        }
        false
    }

    fn payload(&self) -> String {
        let payload = WebhookPayload { state: self.state, input: self.input, webhook: self.url };
        serde_json::to_string(&payload).expect("text and checked JSON can be written as JSON")
    }
}
