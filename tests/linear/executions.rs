//! Histories made by chance: of a server that does one thing after the other, of one that was taken over badly, and small
//! ones of which every order is tried.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::checker::{Call, Operation, Refusal, Reply, check};

/// Between two instants at which the server does something.
const STEP: u64 = 100;
const KEYS: usize = 2;

/// One thing that the server does, and how its client sees it.
#[derive(Clone, Debug)]
struct Step {
    key: usize,
    call: Call,
    /// Asked so long before, answered so long after.
    before: u64,
    after: u64,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    /// Done, but its client was not told.
    Unheard,
    /// Asked for, and never done.
    Dropped,
}

fn any_call() -> impl Strategy<Value = Call> {
    prop_oneof![Just(Call::Read), (1..5_i64).prop_map(Call::Write), Just(Call::Increment)]
}

fn any_fate() -> impl Strategy<Value = Fate> {
    prop_oneof![18 => Just(Fate::Answered), 1 => Just(Fate::Unheard), 1 => Just(Fate::Dropped)]
}

fn step(call: impl Strategy<Value = Call>) -> impl Strategy<Value = Step> {
    (0..KEYS, call, 0..6 * STEP, 0..6 * STEP, any_fate()).prop_map(|(key, call, before, after, fate)| Step {
        key,
        call,
        before,
        after,
        fate,
    })
}

/// What is asked for, when, and how much later it is answered how.
type Small = (Call, u64, Option<(u64, i64)>);

/// What a server holds, and does.
#[derive(Clone, Default)]
struct Server([i64; KEYS]);

impl Server {
    fn apply(&mut self, key: usize, call: Call) -> i64 {
        let value = &mut self.0[key];
        match call {
            Call::Read => {}
            Call::Write(new) => *value = new,
            Call::Increment => *value += 1,
        }
        *value
    }
}

/// The clients' view when the server does `steps` in this order; before each, `meddle` may do to the server what it likes.
fn run(steps: &[Step], mut meddle: impl FnMut(usize, &mut Server)) -> Vec<Operation> {
    let (mut server, mut clients) = (Server::default(), Vec::<u64>::new());
    let one = |(index, step): (usize, &Step)| {
        let now = (index as u64 + 10) * STEP;
        meddle(index, &mut server);
        let value = if step.fate == Fate::Dropped { 0 } else { server.apply(step.key, step.call) };
        let reply = (step.fate == Fate::Answered).then_some(Reply { at: now + step.after, value });
        // Whoever has been answered; one that was not never asks again.
        let free = clients.iter().position(|free_from| *free_from < now);
        let client = free.unwrap_or_else(|| {
            clients.push(0);
            clients.len() - 1
        });
        let asked_at = (now - step.before).max(clients[client]);
        clients[client] = reply.map_or(u64::MAX, |reply| reply.at + 1);
        Operation { client, key: format!("k{}", step.key), call: step.call, asked_at, reply }
    };
    steps.iter().enumerate().map(one).collect()
}

/// Whether any order of all that was answered, and of some of the rest, explains it: by trying all of them.
fn has_an_order(rest: &[&Operation], value: i64) -> bool {
    if rest.iter().all(|operation| operation.reply.is_none()) {
        return true;
    }
    let first_reply = rest.iter().filter_map(|operation| operation.reply).map(|reply| reply.at).min();
    rest.iter().enumerate().any(|(index, operation)| {
        if first_reply.is_some_and(|at| operation.asked_at > at) {
            return false;
        }
        let after = match operation.call {
            Call::Read => value,
            Call::Write(new) => new,
            Call::Increment => value + 1,
        };
        let told_so = matches!(operation.call, Call::Write(_))
            || operation.reply.is_none_or(|reply| reply.value == after);
        told_so && has_an_order(&[&rest[..index], &rest[index + 1..]].concat(), after)
    })
}

fn is_illegal(history: &[Operation]) -> bool {
    match check(history) {
        Ok(()) => false,
        Err(Refusal::Illegal { .. }) => true,
        Err(other) => panic!("{other}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_one_server_did_is_taken(steps in vec(step(any_call()), 0..200)) {
        let history = run(&steps, |_, _| ());
        if let Err(refusal) = check(&history) {
            return Err(TestCaseError::fail(refusal.to_string()));
        }
    }

    #[test]
    fn the_order_in_which_it_was_written_down_does_not_matter(
        (steps, order) in vec(step(any_call()), 1..60).prop_flat_map(|steps| {
            let places: Vec<usize> = (0..steps.len()).collect();
            (Just(steps), Just(places).prop_shuffle())
        }),
    ) {
        let history = run(&steps, |_, _| ());
        let shuffled: Vec<_> = order.iter().map(|place| history[*place].clone()).collect();
        prop_assert!(!is_illegal(&shuffled));
    }

    #[test]
    fn small_histories_are_judged_as_by_trying_every_order(
        small in vec((any_call(), 0..12_u64, proptest::option::weighted(0.8, (0..12_u64, 0..4_i64))), 0..7),
    ) {
        let operation = |(client, (call, asked_at, reply)): (usize, Small)| {
            let reply = reply.map(|(after, value)| Reply { at: asked_at + after, value });
            Operation { client, key: "k".to_owned(), call, asked_at, reply }
        };
        let history: Vec<_> = small.into_iter().enumerate().map(operation).collect();
        prop_assert_eq!(!is_illegal(&history), has_an_order(&history.iter().collect::<Vec<_>>(), 0));
    }

    /// A takeover from an epoch that lacks what was answered.
    #[test]
    fn an_answered_increment_that_is_taken_back_is_refused(
        mut steps in vec(step(Just(Call::Increment)), 2..120),
        (from, to) in any::<(Index, Index)>(),
    ) {
        // One that was answered lies between the epoch and the takeover, and another follows.
        let (from, to) = (from.index(steps.len() - 1), to.index(steps.len() - 1));
        let (from, to) = (from.min(to), from.max(to) + 1);
        for place in [from, to] {
            steps[place].fate = Fate::Answered;
            steps[place].key = 0;
        }
        let mut epoch = Server::default();
        let history = run(&steps, |index, server| {
            if index == from {
                epoch = server.clone();
            }
            if index == to {
                *server = epoch.clone();
            }
        });
        // Both were told the same number, and nobody ever sets a counter back.
        prop_assert!(is_illegal(&history));
    }

    /// Increments that a client sent once, and that were done before and after a takeover.
    #[test]
    fn an_increment_that_is_done_twice_is_refused(
        mut steps in vec(step(Just(Call::Increment)), 2..120),
        twice in any::<Index>(),
    ) {
        for step in &mut steps {
            step.fate = Fate::Answered;
        }
        let twice = twice.index(steps.len());
        let key = steps[twice].key;
        let history = run(&steps, |index, server| if index == twice { server.0[key] += 1 });
        prop_assert!(is_illegal(&history));
    }

    #[test]
    fn a_value_that_nobody_wrote_is_refused(
        mut steps in vec(step(prop_oneof![Just(Call::Read), (1..5_i64).prop_map(Call::Write)]), 1..120),
        wrong in any::<Index>(),
    ) {
        let wrong = wrong.index(steps.len());
        (steps[wrong].call, steps[wrong].fate) = (Call::Read, Fate::Answered);
        let mut history = run(&steps, |_, _| ());
        history[wrong].reply.as_mut().expect("it was answered").value = 77;
        prop_assert!(is_illegal(&history));
    }
}

/// A server that is set back by some steps somewhere: with reads, writes and increments that overlap, most of it shows.
#[test]
fn most_histories_of_a_server_that_was_set_back_are_refused() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};

    const HISTORIES: usize = 300;
    let mut runner = TestRunner::deterministic();
    let set_back = (vec(step(any_call()), 60), 10..50_usize, 3..10_usize);
    let refused = (0..HISTORIES).filter(|_| {
        let (mut steps, at, by) = set_back.new_tree(&mut runner).expect("a history").current();
        for (value, step) in (1000..).step_by(1000).zip(&mut steps) {
            // Where the same is written again and again, or nearly all overlaps, being set back is often being right.
            (step.before, step.after) = (step.before / 3, step.after / 3);
            if let Call::Write(new) = &mut step.call {
                *new = value;
            }
        }
        let mut states = Vec::new();
        is_illegal(&run(&steps, |index, server| {
            states.push(server.clone());
            if index == at {
                *server = states[at - by].clone();
            }
        }))
    });
    let refused = refused.count();
    println!("{refused} of {HISTORIES} refused");
    assert!(refused > HISTORIES * 2 / 3, "only {refused} of {HISTORIES} are refused");
}
