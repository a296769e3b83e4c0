//! One test a rule. Schedules of many steps are in `sim`.

use std::time::Duration;

use super::{Action, Arbiter, Copy, Core, Input, Message, Record, Role, Standing, Start, Ticket, Timing};
use crate::model::{Epoch, EpochId, Term};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn id(term: u64, epoch: u64) -> EpochId {
    EpochId { term: Term(term), epoch: Epoch(epoch) }
}

fn start(
    record: Record,
    copy: Copy,
    held: Option<EpochId>,
    guard_until: Option<Duration>,
) -> (Core, Vec<Action>) {
    start_with(Arbiter::Peer, record, copy, held, guard_until)
}

fn start_with(
    arbiter: Arbiter,
    record: Record,
    copy: Copy,
    held: Option<EpochId>,
    guard_until: Option<Duration>,
) -> (Core, Vec<Action>) {
    let start = Start { arbiter, record, copy, held, guard_until, first_seq: 100 };
    Core::start(Timing::default(), ms(1000), &start).unwrap()
}

/// As [`armed_standby`], with another arbiter.
fn standby_with(arbiter: Arbiter) -> Core {
    let mut core = start_with(arbiter, Record::standby(Term(1)), Copy::Gone, Some(id(1, 5)), None).0;
    hear(&mut core, 1000, heartbeat(1, 1));
    core
}

/// A tick at each of these times; a standby that slept waits once for what was sent meanwhile.
fn ticks(core: &mut Core, times: &[u64]) -> Vec<Action> {
    times.iter().flat_map(|at| core.handle(ms(*at), Input::Tick)).collect()
}

fn armed_record() -> Record {
    Record { role: Role::Primary { armed: Some(Epoch(64)), handoff: false }, ..Record::primary(Term(1)) }
}

/// A primary of term 1 whose guard fires at 1250 ms.
fn armed_primary() -> Core {
    start(armed_record(), Copy::Running, None, Some(ms(1250))).0
}

/// A standby of term 1 that holds epoch 1.5, and started and heard its primary at 1000 ms.
fn armed_standby() -> Core {
    standby_with(Arbiter::Peer)
}

fn hear(core: &mut Core, at: u64, message: Message) -> Vec<Action> {
    core.handle(ms(at), Input::Message(message))
}

fn heartbeat(term: u64, seq: u64) -> Message {
    Message::Heartbeat { term: Term(term), seq, sent_at: ms(7) }
}

fn grant(seq: u64, sent_at: u64) -> Message {
    Message::Ack { term: Term(1), seq, sent_at: ms(sent_at), granted: true }
}

fn ticket(actions: &[Action]) -> (Ticket, Record) {
    let written = actions.iter().find_map(|action| match action {
        Action::Persist { ticket, record: Some(record) } => Some((*ticket, *record)),
        _ => None,
    });
    written.unwrap_or_else(|| panic!("nothing is written in {actions:?}"))
}

/// Lets the write in `actions` end.
fn written(core: &mut Core, at: u64, actions: &[Action]) -> Vec<Action> {
    core.handle(ms(at), Input::Persisted(ticket(actions).0))
}

fn promoting() -> Core {
    let mut core = armed_standby();
    let actions = core.handle(ms(1307), Input::Tick);
    written(&mut core, 1308, &actions);
    core
}

fn handing_off() -> Core {
    let mut core = armed_primary();
    let actions = core.handle(ms(1010), Input::HandoffReady(id(1, 9)));
    assert!(
        !actions.iter().any(|a| matches!(a, Action::Send(Message::TakeOver { .. }))),
        "before it is durable"
    );
    let sent = written(&mut core, 1012, &actions);
    assert!(sent.contains(&Action::Send(Message::TakeOver { term: Term(2), epoch: id(1, 9) })));
    core
}

#[test]
fn the_lease_counts_from_the_time_of_sending() {
    let mut core = armed_primary();
    let actions = hear(&mut core, 1040, grant(100, 1000));
    assert!(actions.contains(&Action::ExtendGuard { until: ms(1250) }));
}

#[test]
fn an_ack_of_another_life_extends_nothing() {
    let mut core = armed_primary();
    assert_eq!(hear(&mut core, 1040, grant(99, 1000)), []);
    assert_eq!(hear(&mut core, 1041, grant(100, 1030)), []);
}

#[test]
fn a_lease_that_ends_fences_and_a_grant_unfences() {
    let mut core = armed_primary();
    assert!(core.handle(ms(1250), Input::Tick).contains(&Action::Fence));
    assert_eq!(core.standing(), Standing::Fenced);
    let actions = hear(&mut core, 1260, grant(101, 1250));
    assert!(actions.contains(&Action::Unfence { until: Some(ms(1500)) }), "{actions:?}");
}

#[test]
fn an_old_grant_does_not_unfence() {
    let mut core = armed_primary();
    core.handle(ms(1250), Input::Tick);
    let actions = hear(&mut core, 1260, grant(100, 1000));
    assert!(!actions.iter().any(|a| matches!(a, Action::Unfence { .. })));
}

#[test]
fn the_guard_is_armed_and_the_record_written_before_a_commit() {
    let (mut core, _) = start(Record::primary(Term(1)), Copy::Running, None, None);
    assert_eq!(core.handle(ms(1001), Input::AskCommit(id(1, 1))), [], "no lease yet");
    let actions = hear(&mut core, 1010, grant(100, 1000));
    assert_eq!(ticket(&actions).1.role, Role::Primary { armed: Some(Epoch(64)), handoff: false });
    let until = ms(1250);
    assert_eq!(written(&mut core, 1012, &actions), [Action::ArmGuard { until }]);
    assert_eq!(core.handle(ms(1013), Input::GuardArmed { until }), [Action::MayCommit(id(1, 1))]);
    assert_eq!(core.handle(ms(1014), Input::AskCommit(id(1, 2))), [Action::MayCommit(id(1, 2))]);
}

#[test]
fn a_guard_that_was_armed_too_late_permits_no_commit() {
    let (mut core, _) = start(Record::primary(Term(1)), Copy::Running, None, None);
    core.handle(ms(1001), Input::AskCommit(id(1, 1)));
    let actions = hear(&mut core, 1010, grant(100, 1000));
    written(&mut core, 1012, &actions);
    core.handle(ms(1400), Input::GuardLate { until: ms(1250) });
    assert_eq!(core.standing(), Standing::Primary);
    let actions = hear(&mut core, 1410, grant(101, 1400));
    assert!(actions.contains(&Action::ArmGuard { until: ms(1650) }), "{actions:?}");
}

#[test]
fn an_armed_primary_without_a_guard_fences_itself_at_start() {
    let (core, actions) = start(armed_record(), Copy::Running, None, None);
    assert_eq!(actions[0], Action::Fence);
    assert_eq!(core.standing(), Standing::Fenced);
}

#[test]
fn a_primary_whose_copy_is_gone_asks_and_waits() {
    let (mut core, actions) = start(armed_record(), Copy::Gone, None, None);
    assert_eq!(actions, [Action::Send(Message::Inquire { term: Term(1) })]);
    let known = Message::Known { term: Term(1), standing: Standing::Standby, held: Some(id(1, 4)) };
    assert_eq!(hear(&mut core, 1010, known), []);
    assert_eq!(core.standing(), Standing::Lost);
    let actions = hear(&mut core, 1020, heartbeat(2, 1));
    let done = written(&mut core, 1021, &actions);
    assert!(done.contains(&Action::BecomeStandby { term: Term(2) }));
}

#[test]
fn a_standby_that_has_just_started_lets_its_primary_find_it() {
    let mut core = start(Record::standby(Term(1)), Copy::Gone, Some(id(1, 5)), None).0;
    assert_eq!(core.next_deadline(), Some(ms(2500)));
    assert_eq!(core.handle(ms(2499), Input::Tick), []);
    ticket(&core.handle(ms(2500), Input::Tick));
}

#[test]
fn a_standby_waits_a_whole_lease_and_the_drift_after_a_grant() {
    let mut core = armed_standby();
    assert_eq!(core.next_deadline(), Some(ms(1306) + Duration::from_nanos(1)));
    assert_eq!(core.handle(ms(1306), Input::Tick), []);
    let actions = core.handle(ms(1307), Input::Tick);
    let (_, record) = ticket(&actions);
    assert_eq!((record.term, record.role), (Term(2), Role::Promoting { epoch: id(1, 5) }));
    assert_eq!(actions.len(), 1, "nothing before it is durable");
}

#[test]
fn a_grant_postpones_promotion_and_a_decision_ends_grants() {
    let mut core = armed_standby();
    let ack =
        |term, granted| Action::Send(Message::Ack { term: Term(term), seq: 1, sent_at: ms(7), granted });
    assert_eq!(hear(&mut core, 1200, heartbeat(1, 1)), [ack(1, true)]);
    assert_eq!(core.handle(ms(1307), Input::Tick), []);
    let actions = core.handle(ms(1507), Input::Tick);
    assert_eq!(hear(&mut core, 1508, heartbeat(1, 1)), [ack(1, false)], "the new term is not durable yet");
    let restore = written(&mut core, 1509, &actions);
    assert_eq!(restore, [Action::Restore { epoch: id(1, 5), term: Term(2), eager: false }]);
    assert_eq!(hear(&mut core, 1510, heartbeat(1, 1)), [ack(2, false)]);
}

#[test]
fn a_standby_that_slept_reads_its_mail_first() {
    let mut core = armed_standby();
    assert_eq!(core.handle(ms(3000), Input::Tick), []);
    hear(&mut core, 3001, heartbeat(1, 1));
    assert_eq!(core.handle(ms(3100), Input::Tick), []);
    let mut core = armed_standby();
    core.handle(ms(3000), Input::Tick);
    assert!(!core.handle(ms(3100), Input::Tick).is_empty(), "but once only");
}

#[test]
fn a_standby_without_an_armed_epoch_never_promotes() {
    let (mut empty, _) = start(Record::standby(Term(1)), Copy::Gone, None, None);
    let (mut old, _) = start(Record::standby(Term(2)), Copy::Gone, Some(id(1, 5)), None);
    for core in [&mut empty, &mut old] {
        assert_eq!(core.next_deadline(), None);
        assert_eq!(core.handle(ms(9000), Input::Tick), []);
    }
}

#[test]
fn a_suspended_standby_is_armed_only_by_a_later_epoch() {
    let mut core = armed_standby();
    let suspend = Message::Suspend { term: Term(1), through: id(1, 64) };
    let actions = hear(&mut core, 1010, suspend);
    let reply = Action::Send(Message::Suspended { term: Term(1), through: id(1, 64) });
    assert!(!actions.contains(&reply));
    assert_eq!(written(&mut core, 1011, &actions), [reply]);
    core.handle(ms(1012), Input::Committed(id(1, 64)));
    assert_eq!(core.handle(ms(1400), Input::Tick), []);
    core.handle(ms(1401), Input::Committed(id(1, 65)));
    assert!(core.next_deadline().is_some());
}

#[test]
fn suspending_covers_every_epoch_that_may_be_under_way() {
    let mut core = armed_primary();
    let actions = core.handle(ms(1010), Input::Suspend);
    assert!(actions.contains(&Action::Send(Message::Suspend { term: Term(1), through: id(1, 64) })));
    assert_eq!(core.handle(ms(1011), Input::AskCommit(id(1, 6))), []);
    assert_eq!(
        hear(&mut core, 1012, Message::Suspended { term: Term(1), through: id(1, 3) }),
        [],
        "an earlier one"
    );
    let actions = hear(&mut core, 1013, Message::Suspended { term: Term(1), through: id(1, 64) });
    assert_eq!(written(&mut core, 1014, &actions), [Action::DisarmGuard, Action::Suspended]);
    assert_eq!(core.first_epoch(), Epoch(65));
    assert!(!core.handle(ms(9000), Input::Tick).contains(&Action::Fence));
}

#[test]
fn a_standby_that_is_to_stop_has_the_primary_disarm_it() {
    let mut standby = armed_standby();
    let actions = standby.handle(ms(1010), Input::Suspend);
    assert_eq!(actions, [Action::Send(Message::AskSuspend { term: Term(1) })]);
    let mut primary = armed_primary();
    let actions = hear(&mut primary, 1011, Message::AskSuspend { term: Term(1) });
    let Some(&Action::Send(suspend)) = actions.first() else { panic!("{actions:?}") };
    let actions = hear(&mut standby, 1012, suspend);
    let done = written(&mut standby, 1013, &actions);
    assert_eq!(done[1], Action::Suspended, "the answer goes first");
    let actions = hear(&mut standby, 1014, heartbeat(1, 1));
    assert!(matches!(actions[..], [Action::Send(Message::Ack { granted: false, .. })]));
}

#[test]
fn withdrawing_forgets_there_and_disarms_here() {
    let mut primary = armed_primary();
    let mut standby = armed_standby();
    assert!(
        primary
            .handle(ms(1010), Input::Withdraw)
            .contains(&Action::Send(Message::Withdraw { term: Term(1) }))
    );
    let actions = hear(&mut standby, 1011, Message::Withdraw { term: Term(1) });
    let [Action::Persist { ticket, record: None }] = actions[..] else { panic!("{actions:?}") };
    let done = standby.handle(ms(1012), Input::Persisted(ticket));
    let reply = Message::Withdrawn { term: Term(1) };
    assert_eq!(done, [Action::Send(reply), Action::Forgotten]);
    let actions = hear(&mut primary, 1013, reply);
    assert_eq!(written(&mut primary, 1014, &actions), [Action::DisarmGuard, Action::Unprotected]);
}

#[test]
fn nothing_is_announced_before_it_is_written_that_it_runs() {
    let mut core = promoting();
    let actions = core.handle(ms(1400), Input::Restored);
    assert_eq!(actions.len(), 1);
    assert_eq!(ticket(&actions).1.role, Role::Primary { armed: None, handoff: false });
    assert!(written(&mut core, 1401, &actions).contains(&Action::Announce { term: Term(2) }));
    assert_eq!(core.standing(), Standing::Primary);
}

#[test]
fn a_failed_restore_is_tried_again_eagerly_and_then_reported() {
    let mut core = promoting();
    let fail = || Input::RestoreFailed { reason: "no pid".to_owned() };
    let again = [Action::Restore { epoch: id(1, 5), term: Term(2), eager: true }];
    assert_eq!(core.handle(ms(1400), fail()), again);
    assert_eq!(core.handle(ms(1401), fail()), again);
    assert!(core.handle(ms(1402), fail()).contains(&Action::Stuck { reason: "no pid".to_owned() }));
    assert_eq!(core.stuck_reason(), Some("no pid"));
    assert!(!core.handle(ms(1403), Input::RetryRestore).is_empty());
}

#[test]
fn a_promotion_that_was_interrupted_is_taken_up_again() {
    let record =
        Record { term: Term(2), role: Role::Promoting { epoch: id(1, 5) }, ..Record::standby(Term(1)) };
    let (_, actions) = start(record, Copy::Running, Some(id(1, 5)), None);
    assert_eq!(actions, [Action::Restore { epoch: id(1, 5), term: Term(2), eager: false }]);
}

#[test]
fn a_newer_term_fences_at_once_and_destroys_only_when_it_runs() {
    let mut core = armed_primary();
    let refused = Message::Ack { term: Term(2), seq: 100, sent_at: ms(1000), granted: false };
    let actions = hear(&mut core, 1010, refused);
    assert_eq!(actions[0], Action::Fence);
    assert!(!actions.contains(&Action::DestroyCopy));
    assert_eq!(hear(&mut core, 1011, grant(100, 1000)), [], "a late grant does not bring it back");
    let promoting = Message::Known { term: Term(2), standing: Standing::Promoting, held: None };
    assert_eq!(hear(&mut core, 1012, promoting), []);
    let actions = hear(&mut core, 1013, Message::Running { term: Term(2) });
    assert_eq!(ticket(&actions).1.role, Role::Standby);
    let done = written(&mut core, 1014, &actions);
    assert_eq!(done[0], Action::DestroyCopy);
    assert!(done.contains(&Action::BecomeStandby { term: Term(2) }));
}

#[test]
fn a_workload_that_cannot_be_restored_there_comes_back_here() {
    let mut primary = armed_primary();
    hear(&mut primary, 1010, Message::Inquire { term: Term(2) });
    let stuck = Message::Known { term: Term(2), standing: Standing::Stuck, held: Some(id(1, 5)) };
    assert_eq!(hear(&mut primary, 1011, stuck), [Action::Send(Message::Abort { term: Term(2) })]);
    let mut standby = promoting();
    for _ in 0..3 {
        standby.handle(ms(1400), Input::RestoreFailed { reason: "no pid".to_owned() });
    }
    let actions = hear(&mut standby, 1401, Message::Abort { term: Term(2) });
    let done = written(&mut standby, 1402, &actions);
    assert!(done.contains(&Action::Send(Message::Yielded { term: Term(2) })));
    let actions = hear(&mut primary, 1403, Message::Yielded { term: Term(2) });
    assert_eq!(ticket(&actions).1.term, Term(3));
    assert!(written(&mut primary, 1404, &actions).contains(&Action::Unfence { until: None }));
}

#[test]
fn a_standby_takes_over_only_the_next_term_and_the_very_epoch() {
    let mut core = armed_standby();
    let actions = hear(&mut core, 1010, Message::TakeOver { term: Term(2), epoch: id(1, 5) });
    assert_eq!(ticket(&actions).1.role, Role::Promoting { epoch: id(1, 5) });
    for (term, epoch) in [(2, id(1, 6)), (3, id(1, 5))] {
        let mut core = armed_standby();
        let actions = hear(&mut core, 1010, Message::TakeOver { term: Term(term), epoch });
        let (_, record) = ticket(&actions);
        assert_eq!((record.role, record.refused), (Role::Standby, Term(term)));
        let done = written(&mut core, 1011, &actions);
        assert_eq!(done, [Action::Send(Message::Yielded { term: Term(term) })]);
        assert_eq!(core.handle(ms(9000), Input::Tick), [], "nor does it promote by itself");
    }
}

#[test]
fn a_handoff_that_is_refused_runs_on_two_terms_later() {
    let mut core = handing_off();
    assert!(!hear(&mut core, 1020, grant(100, 1000)).iter().any(|a| matches!(a, Action::Unfence { .. })));
    let actions = hear(&mut core, 1030, Message::Yielded { term: Term(2) });
    assert_eq!(ticket(&actions).1.term, Term(3));
    let done = written(&mut core, 1031, &actions);
    assert!(done.contains(&Action::Unfence { until: None }));
    assert_eq!(core.standing(), Standing::Primary);
}

#[test]
fn a_handoff_without_an_answer_is_called_back_and_the_refusal_is_durable() {
    let mut core = handing_off();
    let actions = core.handle(ms(11_100), Input::Tick);
    assert!(actions.contains(&Action::Send(Message::Abort { term: Term(2) })));
    let mut standby = armed_standby();
    let actions = hear(&mut standby, 1010, Message::Abort { term: Term(2) });
    written(&mut standby, 1011, &actions);
    let late = hear(&mut standby, 1012, Message::TakeOver { term: Term(2), epoch: id(1, 5) });
    assert_eq!(late, [Action::Send(Message::Yielded { term: Term(2) })]);
}

#[test]
fn a_takeover_that_has_begun_is_not_called_back() {
    let mut core = promoting();
    let actions = hear(&mut core, 1400, Message::Abort { term: Term(2) });
    assert!(matches!(actions[..], [Action::Send(Message::Known { standing: Standing::Promoting, .. })]));
}

#[test]
fn a_source_that_restarts_in_a_handoff_stays_frozen_and_asks() {
    let record = Record { role: Role::Primary { armed: Some(Epoch(64)), handoff: true }, ..armed_record() };
    let (core, actions) = start(record, Copy::Frozen, None, None);
    assert_eq!(actions, [Action::Send(Message::Abort { term: Term(2) })]);
    assert_eq!(core.standing(), Standing::Fenced);
}

#[test]
fn force_skips_the_term_that_the_standby_may_be_using() {
    let mut core = armed_primary();
    let running = core.handle(ms(1010), Input::ForceRunAlone);
    assert!(matches!(running[..], [Action::Rejected { .. }]), "{running:?}");
    core.handle(ms(1250), Input::Tick);
    let actions = core.handle(ms(1260), Input::ForceRunAlone);
    assert_eq!(ticket(&actions).1.term, Term(3));
    assert!(written(&mut core, 1261, &actions).contains(&Action::Unfence { until: None }));
}

#[test]
fn where_a_forced_primary_meets_a_promoted_one_the_higher_term_stays() {
    let mut promoted = promoting();
    let actions = promoted.handle(ms(1400), Input::Restored);
    written(&mut promoted, 1401, &actions);
    let actions = hear(&mut promoted, 1500, heartbeat(3, 1));
    assert_eq!(actions[0], Action::Fence);
    let done = written(&mut promoted, 1501, &actions);
    assert_eq!(done[0], Action::DestroyCopy);
}

#[test]
fn an_older_term_is_answered_with_the_newer() {
    let (mut core, _) = start(Record::standby(Term(3)), Copy::Gone, None, None);
    for message in [
        Message::Suspend { term: Term(1), through: id(1, 9) },
        Message::Withdraw { term: Term(1) },
        Message::TakeOver { term: Term(2), epoch: id(1, 9) },
    ] {
        let actions = hear(&mut core, 1010, message);
        assert!(matches!(actions[..], [Action::Send(Message::Known { term: Term(3), .. })]), "{actions:?}");
    }
    assert!(!core.accepts_epoch(id(1, 9)));
}

#[test]
fn the_guard_that_fired_before_it_was_disarmed_is_undone() {
    let (mut core, _) = start(Record::primary(Term(1)), Copy::Running, None, None);
    assert_eq!(core.handle(ms(1001), Input::GuardFired), [Action::Unfence { until: None }]);
}

// Who decides besides the two.

#[test]
fn a_key_of_the_store_lets_a_primary_run_on_without_its_standby() {
    let (mut core, _) = start_with(Arbiter::Store, armed_record(), Copy::Running, None, Some(ms(1250)));
    assert_eq!(core.claim(), Some(Term(1)));
    let leased = |term, until| Input::Leased { term: Term(term), until: ms(until) };
    ticks(&mut core, &[1100]);
    assert_eq!(core.handle(ms(1100), leased(3, 9000)), []);
    let extended = core.handle(ms(1100), leased(1, 2000));
    assert_eq!(extended, [Action::ExtendGuard { until: ms(1950) }]);
    assert!(!core.handle(ms(1940), Input::Tick).contains(&Action::Fence));
    assert!(core.handle(ms(1950), Input::Tick).contains(&Action::Fence));
    // The key is still its own: then nobody else has run.
    ticks(&mut core, &[2100]);
    let again = core.handle(ms(2100), leased(1, 2600));
    assert_eq!(again, [Action::Unfence { until: Some(ms(2550)) }]);
}

#[test]
fn a_standby_takes_over_only_with_the_key_and_in_silence() {
    let mut core = standby_with(Arbiter::Store);
    assert_eq!(core.claim(), None);
    assert_eq!(ticks(&mut core, &[1310]), [Action::Ask { term: Term(2) }]);
    assert_eq!(core.claim(), Some(Term(2)));
    // Asked once.
    assert_eq!(ticks(&mut core, &[1320]), []);
    // A heartbeat is granted meanwhile: the key alone decides nothing.
    hear(&mut core, 1330, heartbeat(1, 7));
    assert_eq!(core.claim(), None);
    assert_eq!(core.handle(ms(1340), Input::Agreed { term: Term(2) }), []);
    assert_eq!(core.standing(), Standing::Standby);
    assert_eq!(ticks(&mut core, &[1640]), [Action::Ask { term: Term(2) }]);
    // No: it is asked again, later.
    core.handle(ms(1650), Input::Disagreed { term: Term(2) });
    assert_eq!(ticks(&mut core, &[1700]), []);
    assert_eq!(ticks(&mut core, &[1951]), [Action::Ask { term: Term(2) }]);
    let (_, record) = ticket(&core.handle(ms(1960), Input::Agreed { term: Term(2) }));
    assert_eq!(record.role, Role::Promoting { epoch: id(1, 5) });
    assert_eq!(core.claim(), Some(Term(2)));
}

#[test]
fn a_standby_has_its_peer_switched_off_before_it_takes_over() {
    let mut core = standby_with(Arbiter::Command);
    assert_eq!(ticks(&mut core, &[1310]), [Action::Ask { term: Term(2) }]);
    assert_eq!(core.handle(ms(1400), Input::Agreed { term: Term(4) }), []);
    // It was heard before it was off.
    hear(&mut core, 1410, heartbeat(1, 7));
    let (_, record) = ticket(&core.handle(ms(1420), Input::Agreed { term: Term(2) }));
    assert_eq!(record.term, Term(2));
}

#[test]
fn without_a_lease_a_primary_commits_and_runs_on_in_silence() {
    let (mut core, _) = start_with(Arbiter::Command, armed_record(), Copy::Running, None, None);
    let committed = core.handle(ms(1001), Input::AskCommit(id(1, 5)));
    assert_eq!(committed, [Action::MayCommit(id(1, 5))]);
    assert!(!ticks(&mut core, &[2000, 9000]).contains(&Action::Fence));
    // A copy that an agent finds frozen waits for the peer's word.
    let (mut core, actions) = start_with(Arbiter::Command, armed_record(), Copy::Frozen, None, None);
    assert!(!actions.iter().any(|action| matches!(action, Action::Unfence { .. })));
    assert_eq!(hear(&mut core, 1010, grant(100, 1000)), [Action::Unfence { until: None }]);
}

#[test]
fn a_standby_of_an_operator_takes_over_when_told_to() {
    let mut core = standby_with(Arbiter::Operator);
    assert_eq!(ticks(&mut core, &[1310, 1500, 9000]), []);
    let (_, record) = ticket(&core.handle(ms(9001), Input::ForcePromote));
    assert_eq!(record.role, Role::Promoting { epoch: id(1, 5) });
    // Not from nothing.
    let mut empty = start(Record::standby(Term(1)), Copy::Gone, None, None).0;
    assert!(matches!(empty.handle(ms(1001), Input::ForcePromote)[..], [Action::Rejected { .. }]));
}

#[test]
fn what_an_operator_fenced_stays_so_and_asks_for_nothing() {
    let mut core = armed_primary();
    ticks(&mut core, &[1001]);
    let actions = core.handle(ms(1010), Input::Fence);
    assert!(actions.contains(&Action::Fence));
    let (written, record) = ticket(&actions);
    assert!(record.fenced);
    core.handle(ms(1011), Input::Persisted(written));
    // Neither a grant that was under way nor time.
    assert_eq!(hear(&mut core, 1020, grant(100, 1000)), []);
    assert_eq!(ticks(&mut core, &[1100, 2000]), []);
    // Nor another life of the agent, whatever it finds.
    for copy in [Copy::Frozen, Copy::Running] {
        let (mut next, actions) = start(record, copy, None, Some(ms(1250)));
        assert_eq!(actions.contains(&Action::Fence), copy == Copy::Running);
        assert_eq!(ticks(&mut next, &[1100]), []);
        let (written, record) = ticket(&next.handle(ms(1200), Input::Unfence));
        assert!(!record.fenced);
        let asked = next.handle(ms(1201), Input::Persisted(written));
        assert!(matches!(asked[..], [Action::Send(Message::Heartbeat { .. })]), "{asked:?}");
        let back = hear(&mut next, 1210, grant(100, 1201));
        assert!(matches!(back[..], [Action::Unfence { until: Some(_) }]), "{back:?}");
    }
}
