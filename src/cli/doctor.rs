//! `standin doctor`
use super::Outcome;
#[derive(clap::Args)]
pub(super) struct Args {}
pub(super) fn main(_: &Args) -> Outcome {
    Ok(())
}
