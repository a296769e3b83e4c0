//! The gate of a sandbox: its veth's end on the host, up or down.

use std::time::Duration;

use crate::workload::{
    control::ControlError,
    netlink::{NetError, NetStep, RouteSocket},
    network::Gate,
    sandbox::Sandbox,
};

/// The kernel's link watch runs at least once a second.
const RUNNING_LIMIT: Duration = Duration::from_millis(1500);

/// Why a gate did not open.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The keeper refused, because the guard has fired, or it could not be asked.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// rtnetlink.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It is open, and passes nothing.
    #[error(
        "the sandbox's eth0 has no carrier {} ms after its gate was opened; see `ip link` inside and outside",
        RUNNING_LIMIT.as_millis()
    )]
    NoCarrier,
}

/// Lets packets pass, and returns when they do. Refused once the guard has fired. A workload in the host's
/// network has no gate.
///
/// Announce the addresses right after it: a neighbour that asked in vain meanwhile asks again only after a second.
pub fn open(sandbox: &Sandbox) -> Result<(), GateError> {
    let Some(gate) = sandbox.gate() else { return Ok(()) };
    sandbox.keeper().apply(&gate.open_steps())?;
    await_running(sandbox)
}

/// Undoes a fence, in this order: the guard is armed with the deadline, the tree thawed, the gate opened and
/// `steps` applied (see [`Addresses::up_steps`](super::address::Addresses::up_steps)); all but the waiting is done by
/// the sandbox's init, so that no firing can be overtaken.
pub fn unfence(sandbox: &Sandbox, deadline_ns: u64, steps: &[NetStep]) -> Result<(), GateError> {
    let mut all = sandbox.gate().map(Gate::open_steps).unwrap_or_default();
    all.extend(steps);
    sandbox.keeper().unfence(deadline_ns, &all)?;
    await_running(sandbox)
}

fn await_running(sandbox: &Sandbox) -> Result<(), GateError> {
    match sandbox.gate().map(|gate| gate.await_running(RUNNING_LIMIT)).transpose()? {
        Some(false) => Err(GateError::NoCarrier),
        _ => Ok(()),
    }
}

/// Lets none pass, whatever the state of the sandbox's init. `route` is best opened ahead of time.
pub fn close(sandbox: &Sandbox, route: &RouteSocket) -> Result<(), NetError> {
    match sandbox.gate() {
        Some(gate) => route.apply(&gate.close_steps()),
        None => Ok(()),
    }
}
