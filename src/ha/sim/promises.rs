//! Faults, and the promises that must hold in spite of them.

use super::{Event, FAULTS_US, Node, Tree, Work, World};
use crate::ha::{Core, Input, Standing};

impl World {
    pub(super) fn chaos(&mut self) {
        if self.now_us >= FAULTS_US {
            return;
        }
        self.after(20_000, 200_000, Event::Chaos);
        let node = self.rng.range(0, 2) as usize;
        match self.rng.range(0, 16) {
            0..=2 => self.pause(node),
            3 => self.stop_agent(node, (5_000, 500_000)),
            4 if self.power_cuts && self.rng.one_in(3) => self.cut_power(node),
            5..=6 => {
                let until = self.now_us + self.rng.range(50_000, 1_200_000);
                self.cut_until[node] = until;
                if self.rng.one_in(2) {
                    self.cut_until[1 - node] = until;
                }
                self.note(|| format!("{node} is cut off until {until}"));
            }
            7 => self.give(node, Work::Input(Input::Suspend)),
            8..=9 => self.nodes[node].wants_handoff = true,
            10 => self.give(node, Work::Input(Input::AbortHandoff)),
            11 => self.give(node, Work::Input(Input::Fence)),
            12 => self.give(node, Work::Input(Input::Unfence)),
            13 => self.give(node, Work::Input(Input::Resume)),
            14 => self.cut_store(node),
            _ => {}
        }
    }

    /// When the faults are over: what an operator would do.
    pub(super) fn nurse(&mut self) {
        self.after(300_000, 300_001, Event::Nurse);
        for node in 0..2 {
            if self.nodes[node].core.as_ref().is_some_and(|core| core.standing() == Standing::Stuck) {
                self.give(node, Work::Input(Input::RetryRestore));
            }
            self.give(node, Work::Input(Input::Unfence));
        }
    }

    // Promises.

    pub(super) fn check_one_runs(&mut self) {
        let runs = |node: &Node| matches!(node.tree, Tree::Running | Tree::Restoring);
        if runs(&self.nodes[0]) && runs(&self.nodes[1]) {
            self.violate("two copies run".to_owned());
        }
    }

    pub(super) fn check_progress(&mut self) {
        let standing = |node: &Node| node.core.as_ref().map(Core::standing);
        let running: Vec<usize> = (0..2).filter(|&n| self.nodes[n].tree == Tree::Running).collect();
        if let [primary] = running[..] {
            let (one, other) = (&self.nodes[primary], &self.nodes[1 - primary]);
            let guarded = |node: &Node| node.core.as_ref().is_some_and(Core::armed);
            let well = standing(one) == Some(Standing::Primary) && standing(other) == Some(Standing::Standby);
            if !well || !guarded(one) || !guarded(other) || other.tree != Tree::Gone {
                let both = (one.core.clone(), other.core.clone());
                self.violate(format!("protection does not resume: {both:?}"));
            }
            return;
        }
        // Nothing runs: only if a power cut took the copy while no standby was entitled to run it.
        let overtaken = self.nodes.iter().any(|node| standing(node) == Some(Standing::Lost));
        let idle = |node: &Node| match standing(node) {
            Some(Standing::Lost) => true,
            // Its copy is older than the one that was lost: only a person may choose it.
            Some(Standing::Fenced) => overtaken && node.tree_term < self.started,
            Some(Standing::Standby) => !node.core.as_ref().is_some_and(Core::armed),
            _ => false,
        };
        if !(self.power_cost_a_copy && self.nodes.iter().all(idle)) {
            let states = self.nodes.each_ref().map(|node| (node.tree, node.core.clone()));
            self.violate(format!("the workload is lost: {states:?}"));
        }
    }
}
