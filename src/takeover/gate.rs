//! The gate of a sandbox: its veth's end on the host, up or down.

use crate::workload::{
    control::ControlError,
    netlink::{NetError, RouteSocket},
    sandbox::Sandbox,
};

/// Lets packets pass. Refused once the guard has fired. A workload in the host's network has no gate.
pub fn open(sandbox: &Sandbox) -> Result<(), ControlError> {
    match sandbox.gate() {
        Some(gate) => sandbox.keeper().apply(&gate.open_steps()),
        None => Ok(()),
    }
}

/// Lets none pass, whatever the state of the sandbox's init. `route` is best opened ahead of time.
pub fn close(sandbox: &Sandbox, route: &RouteSocket) -> Result<(), NetError> {
    match sandbox.gate() {
        Some(gate) => route.apply(&gate.close_steps()),
        None => Ok(()),
    }
}
