//! How it ends: protection that is given up, on both hosts; a workload that is removed, or has ended by itself; an agent
//! that stops. None of these ends a workload that runs but `remove`, which is refused while it is protected.

use tokio::sync::oneshot;

use super::{
    api::{ApiError, UnprotectRequest, WorkloadStatus},
    home::Home,
    hooks::Cause,
    mailbox::Answer,
    owner::Owner,
    standby::Standby,
    trees,
};
use crate::{
    ha::{Input, Standing},
    observe::in_full,
    transport::block_in_place,
    workload::spec::PlaceSpec,
};

impl Owner {
    pub(super) fn unprotect(&mut self, request: UnprotectRequest, answer: Answer<WorkloadStatus>) {
        match self.standing() {
            None => {
                let _ = answer.send(Err(ApiError::refused(format!("{} is not protected", self.name))));
                return;
            }
            Some(Standing::Primary | Standing::Fenced) => {}
            Some(_) => {
                let peer = self.durable.peer.as_deref().unwrap_or("the other host");
                let message = format!("{} does not run here: end its protection on {peer}", self.name);
                let _ = answer.send(Err(ApiError::refused(message)));
                return;
            }
        }
        self.unprotecting = Some(answer);
        if request.force {
            self.event("forced", "the operator says that the standby is down: run on without its word", None);
            self.feed(Input::ForceRunAlone);
            if let Some(answer) = self.unprotecting.take() {
                let _ = answer.send(Ok(self.status()));
            }
            return;
        }
        self.feed(Input::Withdraw);
    }

    pub(super) fn unprotected(&mut self) {
        self.end_session();
        if self.hooks.cause != Some(Cause::Ended) {
            self.hooks.cause = Some(Cause::Unprotected);
        }
        self.core = None;
        self.drop_image();
        self.durable.record = None;
        self.durable.peer = None;
        if let Some(home) = &mut self.home
            && let Err(error) = block_in_place(|| home.give_up_vips(&self.name))
        {
            tracing::warn!(%error, "taking the address down");
        }
        self.durable.spec.vips.clear();
        self.event("unprotected", "protection has ended; the workload runs on", None);
        if self.durable.bare || matches!(self.durable.spec.place, PlaceSpec::Container(_)) {
            self.release();
            if let Err(error) = self.place.forget() {
                tracing::warn!(%error, "the workload's record");
            }
            self.gone = true;
        } else if let Err(error) = self.place.write(&self.durable) {
            tracing::warn!(%error, "the workload's record");
        }
        if let Some(answer) = self.unprotecting.take() {
            let _ = answer.send(Ok(self.status()));
        }
    }

    /// The primary has withdrawn the workload.
    pub(super) fn forgotten(&mut self) {
        self.event("forgotten", "the primary has ended the protection", None);
        self.finish_drill("the primary has ended the protection");
        self.core = None;
        self.drop_image();
        self.destroy_home();
        self.clear_shm();
        self.gone = true;
    }

    /// Also of one that is kept beside the workload.
    fn drop_image(&mut self) {
        if Standby::is_kept(&self.agent, &self.name)
            && let Err(error) = self.open_standby()
        {
            tracing::warn!(error = in_full(&error), "an image that is not needed any more stays");
        }
        if let Some(standby) = self.standby.take() {
            let _ = block_in_place(|| standby.remove());
        }
    }

    fn clear_shm(&self) {
        if let Err(error) = trees::clear_shm(&self.agent.config, &self.name) {
            tracing::warn!(%error, "the workload's /dev/shm could not be removed");
        }
    }

    pub(super) fn remove(&mut self) -> Result<(), ApiError> {
        if self.core.is_some() {
            let message = format!("{} is protected: standin unprotect {} first", self.name, self.name);
            return Err(ApiError::refused(message));
        }
        self.destroy_home();
        self.clear_shm();
        self.place.forget().map_err(ApiError::failed)?;
        self.gone = true;
        Ok(())
    }

    pub(super) fn stop(&mut self, answer: oneshot::Sender<()>) {
        self.end_session();
        if self.core.is_none() {
            let _ = answer.send(());
            return;
        }
        self.stopping = Some(answer);
        self.feed(Input::Suspend);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.home.as_ref().is_some_and(|home| matches!(home.root(), Ok(None)))
    }

    /// The workload has ended by itself: that is not its host's death, and nobody shall revive it.
    pub(super) fn workload_ended(&mut self) {
        self.end_session();
        self.watch_memory();
        self.hooks.cause = Some(Cause::Ended);
        let message = format!("{} has ended by itself", self.name);
        self.event("workload-ended", &message, None);
        self.error = Some(message.clone());
        if let Some(answer) = self.protecting.take() {
            let _ = answer.send(Err(ApiError::refused(message)));
        }
        self.feed(Input::Withdraw);
    }

    /// A process that the kernel kills for want of memory is gone as one that ends: the rest is protected on. But people want
    /// to know. The count is that of the place, which is another after each takeover.
    pub(super) fn watch_memory(&mut self) {
        let Some(kills) = self.home.as_ref().and_then(Home::oom_kills) else { return };
        if kills > self.oom_kills {
            let detail = format!(
                "the kernel has killed {} of its processes for want of memory; see its limit, or that of the host",
                kills - self.oom_kills
            );
            self.event("oom-kill", &detail, None);
        }
        self.oom_kills = kills;
    }
}
