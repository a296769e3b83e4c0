//! The two keys of a workload in etcd, and what is done to them.
//!
//! | key | value | |
//! |---|---|---|
//! | `PREFIX/WORKLOAD/holder` | `{host, term, nonce}` | ends with the etcd lease of the claim that wrote it |
//! | `PREFIX/WORKLOAD/term` | `{term, by, nonce, was: {term, by}}` | the newest term that was given, and what stood there before |

use std::sync::Arc;

use data_encoding::BASE64;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    client::{Client, EtcdError},
    settings::Inner,
};
use crate::model::{Name, Term};

/// Who has the key now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its name.
    pub host: String,
    /// Under which it was given.
    pub term: Term,
    /// Of the claim.
    #[serde(default)]
    pub(super) nonce: String,
}

/// A term and the host that it was given to; term 0 and no host: none ever was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Given {
    pub(super) term: Term,
    pub(super) by: String,
}

/// The newest term that was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Top {
    pub(super) term: Term,
    pub(super) by: String,
    /// Of the claim; empty when a claim was taken back to this.
    pub(super) nonce: String,
    pub(super) was: Given,
}

impl Top {
    /// Whether taking it back changes anything.
    pub(super) fn can_be_taken_back(&self) -> bool {
        self.was.term < self.term
    }
}

/// Both keys at one moment, which no member of etcd that was cut off can have made up.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) holder: Option<Found<Holder>>,
    pub(super) top: Option<Found<Top>>,
    /// Of etcd's own consensus.
    pub(super) raft_term: u64,
}

impl Seen {
    pub(super) fn top(&self) -> Top {
        self.top.as_ref().map(|found| found.value.clone()).unwrap_or_default()
    }
}

#[derive(Debug)]
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) mod_revision: u64,
    /// 0: none.
    pub(super) lease: i64,
}

/// How a claim went.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Yes,
    /// Something was written since it was read.
    Raced,
    /// The claim's lease has ended.
    LeaseGone,
}

pub(super) struct Store {
    client: Client,
    holder: String,
    top: String,
    ttl_s: u64,
}

impl Store {
    pub(super) fn new(etcd: Arc<Inner>, workload: &Name) -> Self {
        let key = |last| format!("{}/{workload}/{last}", etcd.prefix);
        Self { holder: key("holder"), top: key("term"), ttl_s: etcd.ttl.as_secs(), client: Client::new(etcd) }
    }

    pub(super) fn endpoint(&self) -> &str {
        self.client.endpoint()
    }

    pub(super) fn holder_key(&self) -> &str {
        &self.holder
    }

    pub(super) async fn grant(&mut self, lease: i64) -> Result<(), EtcdError> {
        let body = json!({ "ID": lease.to_string(), "TTL": self.ttl_s.to_string() });
        match self.client.call("/v3/lease/grant", &body).await {
            // An answer was lost: nobody else draws the same 63 bits.
            Err(e) if e.is_already_there() => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// `None`: it has ended. The raft term of the member that answered; a leader that others have replaced, and that does not
    /// know it yet, answers too: what it says holds only if a read after it shows the same raft term.
    pub(super) async fn keep_alive(&mut self, lease: i64) -> Result<Option<u64>, EtcdError> {
        let answer = self.client.call("/v3/lease/keepalive", &json!({ "ID": lease.to_string() })).await?;
        Ok((number(&answer["TTL"]) > 0).then(|| raft_term(&answer)))
    }

    /// Ends the lease and what hangs on it; all that still comes of it is refused from then on.
    pub(super) async fn revoke(&mut self, lease: i64) -> Result<(), EtcdError> {
        match self.client.call("/v3/lease/revoke", &json!({ "ID": lease.to_string() })).await {
            Err(e) if e.is_not_found() => Ok(()),
            answer => answer.map(drop),
        }
    }

    pub(super) async fn read(&mut self) -> Result<Seen, EtcdError> {
        let range = |key: &str| json!({ "request_range": { "key": encode(key) } });
        let body = json!({ "success": [range(&self.holder), range(&self.top)] });
        let answer = self.client.call("/v3/kv/txn", &body).await?;
        let kv = |index: usize| &answer["responses"][index]["response_range"]["kvs"][0];
        Ok(Seen {
            holder: found(&self.holder, kv(0))?,
            top: found(&self.top, kv(1))?,
            raft_term: raft_term(&answer),
        })
    }

    /// Gives the key and the term to a claim, if nothing has changed since `seen`, in which nobody held the key.
    pub(super) async fn take(
        &mut self,
        holder: &Holder,
        lease: i64,
        seen: &Seen,
    ) -> Result<Taken, EtcdError> {
        let before = seen.top();
        let was =
            if before.term < holder.term { Given { term: before.term, by: before.by } } else { before.was };
        let top = Top { term: holder.term, by: holder.host.clone(), nonce: holder.nonce.clone(), was };
        let body = json!({
            "compare": [self.nobody_holds(), self.unchanged(seen)],
            "success": [
                { "request_put": { "key": encode(&self.holder), "value": value(holder), "lease": lease.to_string() } },
                { "request_put": { "key": encode(&self.top), "value": value(&top) } },
            ],
        });
        match self.client.call("/v3/kv/txn", &body).await {
            Ok(answer) if answer["succeeded"] == true => Ok(Taken::Yes),
            Ok(_) => Ok(Taken::Raced),
            Err(e) if e.is_not_found() => Ok(Taken::LeaseGone),
            Err(e) => Err(e),
        }
    }

    /// Takes the newest term back to what was before it, if nobody has written it since it was read. False: somebody has.
    pub(super) async fn take_back(&mut self, seen: &Seen) -> Result<bool, EtcdError> {
        let was = seen.top().was;
        let key = encode(&self.top);
        let operation = if was.term == Term(0) {
            json!({ "request_delete_range": { "key": key } })
        } else {
            let top = Top { term: was.term, by: was.by.clone(), nonce: String::new(), was };
            json!({ "request_put": { "key": key, "value": value(&top) } })
        };
        self.change(&[self.unchanged(seen)], &[operation]).await
    }

    /// Deletes the holder's key if it is still the one that was seen. False: it is not.
    pub(super) async fn delete_holder(&mut self, seen: &Seen) -> Result<bool, EtcdError> {
        let unchanged = mod_revision(&self.holder, seen.holder.as_ref().map(|found| found.mod_revision));
        self.change(&[unchanged], &[self.without(&self.holder)]).await
    }

    /// Deletes both, if they are still what was seen. False: they are not.
    pub(super) async fn delete_all(&mut self, seen: &Seen) -> Result<bool, EtcdError> {
        let holder = mod_revision(&self.holder, seen.holder.as_ref().map(|found| found.mod_revision));
        self.change(&[holder, self.unchanged(seen)], &[self.without(&self.holder), self.without(&self.top)])
            .await
    }

    async fn change(&mut self, compare: &[Value], success: &[Value]) -> Result<bool, EtcdError> {
        let body = json!({ "compare": compare, "success": success });
        Ok(self.client.call("/v3/kv/txn", &body).await?["succeeded"] == true)
    }

    #[expect(clippy::unused_self, reason = "reads as one of its kind")]
    fn without(&self, key: &str) -> Value {
        json!({ "request_delete_range": { "key": encode(key) } })
    }

    fn nobody_holds(&self) -> Value {
        json!({ "target": "VERSION", "result": "EQUAL", "key": encode(&self.holder), "version": "0" })
    }

    fn unchanged(&self, seen: &Seen) -> Value {
        mod_revision(&self.top, seen.top.as_ref().map(|found| found.mod_revision))
    }
}

/// A key that is not there has revision 0.
fn mod_revision(key: &str, revision: Option<u64>) -> Value {
    let revision = revision.unwrap_or(0).to_string();
    json!({ "target": "MOD", "result": "EQUAL", "key": encode(key), "mod_revision": revision })
}

fn encode(key: &str) -> String {
    BASE64.encode(key.as_bytes())
}

fn value(value: &impl Serialize) -> String {
    BASE64.encode(json!(value).to_string().as_bytes())
}

/// The gateway writes 64-bit numbers as strings, and leaves out those that are 0.
fn number(value: &Value) -> i64 {
    value.as_str().and_then(|text| text.parse().ok()).or(value.as_i64()).unwrap_or(0)
}

fn raft_term(answer: &Value) -> u64 {
    number(&answer["header"]["raft_term"]) as u64
}

fn found<T: DeserializeOwned>(key: &str, kv: &Value) -> Result<Option<Found<T>>, EtcdError> {
    if kv.is_null() {
        return Ok(None);
    }
    let foreign = |reason: String| EtcdError::Foreign { key: key.to_owned(), reason };
    let bytes = BASE64
        .decode(kv["value"].as_str().unwrap_or_default().as_bytes())
        .map_err(|e| foreign(e.to_string()))?;
    let value = serde_json::from_slice(&bytes).map_err(|e| foreign(e.to_string()))?;
    Ok(Some(Found { value, mod_revision: number(&kv["mod_revision"]) as u64, lease: number(&kv["lease"]) }))
}
