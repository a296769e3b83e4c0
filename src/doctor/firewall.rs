//! What others' rules in the packet filter do to sandboxes, whose packets the host passes on.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Check, Group};

const ID: &str = "forward-policy";

/// Looks in the calling thread's network namespace: it must be the host's.
pub(super) fn check() -> Option<Check> {
    // Without `nft` there is a check that says so, and nothing to be told of here.
    let chains = nft(&["-j", "list", "chains"])?;
    let dropping: Vec<_> = dropping(&chains)
        .into_iter()
        .filter(|chain| {
            let rules = nft(&["list", "table", &chain.family, &chain.table]).unwrap_or_default();
            // A rule for them, whatever it says: whoever wrote it knows of them.
            !rules.contains("\"sd-")
        })
        .collect();
    if dropping.is_empty() {
        return Some(Check::ok(Group::Network, ID, "nothing keeps sandboxes' packets from being passed on"));
    }
    let names: Vec<_> = dropping
        .iter()
        .map(|chain| format!("{} of table {} {}", chain.name, chain.family, chain.table))
        .collect();
    let found = format!(
        "what no rule lets pass is dropped by chain {}: sandboxes would not be reached",
        names.join(", ")
    );
    let remedy = "let them pass: `iptables -I FORWARD -i sd-+ -j ACCEPT; iptables -I FORWARD -o sd-+ -j ACCEPT`, and so with \
                  ip6tables; where Docker has the chain, into DOCKER-USER; or in the table that is named";
    Some(Check::warn(Group::Network, ID, found, remedy))
}

fn nft(args: &[&str]) -> Option<String> {
    let output = Command::new("nft").args(args).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A chain that drops by default what a host passes on.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    family: String,
    table: String,
    name: String,
}

/// From the words of `nft -j list chains`.
fn dropping(json: &str) -> Vec<Chain> {
    let all: Value = serde_json::from_str(json).unwrap_or_default();
    let chains = all["nftables"].as_array().into_iter().flatten().map(|entry| &entry["chain"]);
    let drops = chains.filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop");
    // What a bridge or a device passes on is none of this matter.
    let routed = drops.filter(|chain| ["ip", "ip6", "inet"].iter().any(|family| chain["family"] == *family));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    routed
        .map(|chain| Chain {
            family: text(&chain["family"]),
            table: text(&chain["table"]),
            name: text(&chain["name"]),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_what_is_routed_are_found() {
        let json = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter",
                "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "accept"}},
            {"chain": {"family": "bridge", "table": "x", "name": "y", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "wall", "name": "in", "hook": "input", "policy": "drop"}},
            {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 4}}]}"#;
        let found = dropping(json);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].family.as_str(), found[0].name.as_str()), ("ip", "FORWARD"));
        assert_eq!(dropping("what is this"), []);
    }
}
