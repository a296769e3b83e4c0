//! The checker of histories is itself checked: by histories of which it is known whether they are linearizable, by executions
//! that are, by what a takeover could do to them, and by trying every order of small ones.

mod checker;
mod executions;

use checker::{Call, Operation, Refusal, Reply, check};

use Call::{Increment, Read, Write};

/// What was asked for, when it was asked and answered, the answer.
type Told = (Call, u64, u64, i64);

fn told((call, asked_at, at, value): Told) -> Operation {
    Operation { client: 0, key: "x".to_owned(), call, asked_at, reply: Some(Reply { at, value }) }
}

fn unheard(call: Call, asked_at: u64) -> Operation {
    Operation { client: 9, key: "x".to_owned(), call, asked_at, reply: None }
}

fn history(told_ones: &[Told], unheard_ones: &[(Call, u64)]) -> Vec<Operation> {
    let unheard_ones = unheard_ones.iter().map(|(call, asked_at)| unheard(*call, *asked_at));
    told_ones.iter().copied().map(told).chain(unheard_ones).collect()
}

fn taken(told_ones: &[Told], unheard_ones: &[(Call, u64)]) {
    if let Err(refusal) = check(&history(told_ones, unheard_ones)) {
        panic!("{refusal}");
    }
}

/// Refused; gives what could not be explained.
fn refused(told_ones: &[Told], unheard_ones: &[(Call, u64)]) -> Operation {
    match check(&history(told_ones, unheard_ones)) {
        Err(Refusal::Illegal { stuck, .. }) => stuck,
        other => panic!("expected to be illegal: {other:?}"),
    }
}

#[test]
fn nothing_at_all_is_linearizable() {
    taken(&[], &[]);
    taken(&[], &[(Increment, 1), (Read, 2), (Write(4), 3)]);
}

#[test]
fn one_after_the_other_is_linearizable() {
    taken(&[(Read, 0, 1, 0), (Write(5), 2, 3, 0), (Increment, 4, 5, 6), (Read, 6, 7, 6)], &[]);
}

#[test]
fn operations_that_overlap_may_have_been_done_in_either_order() {
    // The read begins last and ends first.
    taken(&[(Write(1), 0, 100, 0), (Read, 10, 20, 0)], &[]);
    taken(&[(Write(1), 0, 100, 0), (Read, 10, 20, 1)], &[]);
    taken(&[(Increment, 0, 100, 2), (Increment, 0, 100, 1)], &[]);
    // The second read fits only if the first choice for the writes is taken back.
    taken(&[(Write(1), 0, 100, 0), (Write(2), 0, 100, 0), (Read, 10, 20, 2), (Read, 30, 40, 1)], &[]);
}

#[test]
fn what_ends_as_another_begins_counts_as_overlapping() {
    taken(&[(Write(1), 0, 10, 0), (Read, 10, 20, 0)], &[]);
}

#[test]
fn a_stale_read_is_refused() {
    let stuck = refused(&[(Write(1), 0, 1, 0), (Write(2), 2, 3, 0), (Read, 4, 5, 1)], &[]);
    assert_eq!(stuck.call, Read);
    // Seen, and then no longer: each read alone would be right.
    refused(&[(Write(1), 0, 100, 0), (Read, 10, 20, 1), (Read, 30, 40, 0)], &[]);
}

#[test]
fn a_read_from_the_future_is_refused() {
    refused(&[(Read, 0, 1, 7), (Write(7), 2, 3, 0)], &[]);
}

#[test]
fn a_lost_increment_is_refused() {
    let stuck = refused(&[(Increment, 0, 1, 1), (Increment, 2, 3, 2), (Increment, 4, 5, 2)], &[]);
    assert_eq!(stuck.asked_at, 4);
    refused(&[(Increment, 0, 1, 1), (Read, 2, 3, 0)], &[]);
    // Two at once, of which only one counted.
    refused(&[(Increment, 0, 9, 1), (Increment, 0, 9, 1)], &[]);
}

#[test]
fn a_duplicated_increment_is_refused() {
    refused(&[(Increment, 0, 1, 1), (Increment, 2, 3, 3)], &[]);
    refused(&[(Increment, 0, 1, 1), (Read, 2, 3, 2)], &[]);
}

#[test]
fn writes_out_of_order_are_refused() {
    refused(&[(Write(1), 0, 1, 0), (Write(2), 2, 3, 0), (Read, 4, 5, 2), (Read, 6, 7, 1)], &[]);
    // Two readers that saw two overlapping writes in different orders, one after the other.
    let writes = [(Write(1), 0, 100, 0), (Write(2), 0, 100, 0)];
    let reads = [(Read, 10, 20, 1), (Read, 30, 40, 2), (Read, 50, 60, 1)];
    refused(&[writes.as_slice(), &reads].concat(), &[]);
}

#[test]
fn what_nobody_heard_of_may_have_been_done_at_once_later_or_never() {
    let before = (Increment, 0, 1, 1);
    taken(&[before, (Read, 10, 11, 2)], &[(Increment, 5)]);
    taken(&[before, (Read, 10, 11, 1), (Read, 20, 21, 2)], &[(Increment, 5)]);
    taken(&[before, (Read, 10, 11, 1), (Increment, 20, 21, 2)], &[(Increment, 5)]);
    // A write that took effect after another one that was begun and ended later.
    taken(&[(Write(2), 10, 11, 0), (Read, 20, 21, 2), (Read, 30, 31, 1)], &[(Write(1), 5)]);
}

#[test]
fn what_nobody_heard_of_is_done_once_at_most_and_not_before_it_was_asked_for() {
    let before = (Increment, 0, 1, 1);
    refused(&[before, (Read, 10, 11, 3)], &[(Increment, 5)]);
    refused(&[before, (Read, 10, 11, 2)], &[(Increment, 12)]);
    refused(&[before, (Read, 10, 11, 2), (Read, 20, 21, 1)], &[(Increment, 5)]);
}

#[test]
fn keys_are_independent() {
    let of = |key: &str, call, asked_at, value| Operation {
        key: key.to_owned(),
        ..told((call, asked_at, asked_at + 1, value))
    };
    let mut both = vec![of("x", Increment, 0, 1), of("y", Increment, 2, 1), of("x", Increment, 4, 2)];
    check(&both).expect("each key counts for itself");
    both.push(of("y", Read, 6, 2));
    assert!(matches!(check(&both), Err(Refusal::Illegal { stuck, .. }) if stuck.key == "y"));
}

#[test]
fn an_answer_before_its_question_is_no_history() {
    let refusal = check(&[told((Read, 5, 4, 0))]).expect_err("time goes one way");
    assert!(matches!(refusal, Refusal::Backwards(_)), "{refusal}");
}

#[test]
fn a_refusal_tells_what_does_not_fit_and_what_went_before() {
    let refusal = check(&history(&[(Write(7), 0, 1, 0), (Read, 2, 3, 6)], &[])).expect_err("stale");
    let text = refusal.to_string();
    assert!(text.contains("client 0 Read x, asked at 2, told 6 at 3"), "{text}");
    assert!(text.contains("leaves 7") && text.contains("Write(7)"), "{text}");
}

#[test]
fn a_search_without_end_is_given_up() {
    // Of so many overlapping writes each order must be tried, because the read fits none of them.
    let mut operations: Vec<_> = (1..40).map(|value| told((Write(value), 0, 100, 0))).collect();
    operations.push(told((Read, 0, 100, 99)));
    let refusal = check(&operations).expect_err("not to be explained");
    assert!(matches!(refusal, Refusal::TooHard { .. }), "{refusal}");
}
