//! The gate of a workload whose network is ours: its veth's end on the host, up or down.

use std::time::Duration;

use crate::workload::{
    control::ControlError,
    keeper::Keeper,
    netlink::{NetError, NetStep, RouteSocket},
    network::Gate,
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
        "the workload's eth0 has no carrier {} ms after its gate was opened; see `ip link` inside and outside",
        RUNNING_LIMIT.as_millis()
    )]
    NoCarrier,
}

/// Lets packets pass, and returns when they do. Refused once the guard has fired. A workload in another's
/// network has no gate.
///
/// Announce the addresses right after it: a neighbour that asked in vain meanwhile asks again only after a second.
pub fn open(keeper: &Keeper, gate: Option<&Gate>) -> Result<(), GateError> {
    let Some(gate) = gate else { return Ok(()) };
    keeper.apply(&gate.open_steps())?;
    await_running(gate)
}

/// Undoes a fence, in this order: the guard is armed with the deadline, the tree thawed, the gate opened and
/// `steps` applied (see [`Addresses::up_steps`](super::address::Addresses::up_steps)); all but the waiting is done by
/// the keeper, so that no firing can be overtaken.
pub fn unfence(
    keeper: &Keeper,
    gate: Option<&Gate>,
    deadline_ns: u64,
    steps: &[NetStep],
) -> Result<(), GateError> {
    let mut all = gate.map(Gate::open_steps).unwrap_or_default();
    all.extend(steps);
    keeper.unfence(deadline_ns, &all)?;
    gate.map_or(Ok(()), await_running)
}

fn await_running(gate: &Gate) -> Result<(), GateError> {
    if gate.await_running(RUNNING_LIMIT)? { Ok(()) } else { Err(GateError::NoCarrier) }
}

/// Lets none pass, whatever the state of the keeper. `route` is best opened ahead of time.
pub fn close(gate: &Gate, route: &RouteSocket) -> Result<(), NetError> {
    route.apply(&gate.close_steps())
}
