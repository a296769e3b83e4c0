//! The list of a tree's tasks.

use std::process::Command;

use standin::memory::{TreeError, is_kernel_thread, tasks_of};

use crate::target::Target;

#[test]
fn children_of_every_thread_are_found() {
    let mut target = Target::start();
    let child: i32 = target.ask("fork").parse().unwrap();
    target.ask("writers 2");
    let tasks = tasks_of(target.pid()).unwrap();
    assert_eq!(tasks.len(), 2);
    assert_eq!(tasks[0].pid, target.pid());
    assert_eq!((tasks[1].pid, tasks[1].parent, tasks[1].threads), (child, target.pid(), 1));
    assert!(tasks[0].threads >= 3 && tasks[1].start_ticks >= tasks[0].start_ticks && !tasks[1].zombie);
    crate::target::signal_process(child, libc::SIGKILL);
    crate::target::await_state(child, |states| states == "Z");
    assert!(tasks_of(target.pid()).unwrap()[1].zombie);
}

#[test]
fn a_task_is_named_by_its_pid_in_its_own_namespace() {
    let mut unshare = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "30"])
        .spawn()
        .unwrap();
    let tasks = loop {
        let tasks = tasks_of(unshare.id() as i32).unwrap();
        if tasks.len() == 2 {
            break tasks;
        }
    };
    let inner = (tasks[0].inner_pid, tasks[1].inner_pid);
    unshare.kill().unwrap();
    unshare.wait().unwrap();
    assert_eq!(inner, (tasks[0].pid as u32, 1));
}

#[test]
fn a_kernel_thread_and_an_absent_process_are_told() {
    assert!(is_kernel_thread(2).unwrap() && !is_kernel_thread(1).unwrap());
    assert!(matches!(tasks_of(i32::MAX), Err(TreeError::Gone(_))));
}
