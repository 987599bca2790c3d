//! The loop's side of the data plane: what the kernel is to be made equal to, and what it said.
//!
//! The kernel's own thread does the work (`programmer`); here goals are numbered, failures become problems
//! with a retry, and the core hears what is in use.

use std::time::{Duration, Instant};

use ipnet::Ipv4Net;

use super::{
    Agent, Ending,
    programmer::{Goal, Outcome, State},
    subnet_env,
    underlay::Chosen,
};
use crate::{
    core::{Command, Input, View},
    dataplane::{
        desired::{Desired, Underlay, device_name},
        kernel::KernelError,
    },
};

/// A node that cannot use the kernel gives its new subnet back within this time, or just goes.
const GIVE_BACK: Duration = Duration::from_secs(5);
/// The kernel is compared with the view at least this often.
const RECONCILE: Duration = Duration::from_secs(10);
/// Again after a failure.
const RECONCILE_RETRY: Duration = Duration::from_secs(1);

/// What the loop knows of the kernel.
#[derive(Default)]
pub(super) struct KernelState {
    pub(super) wanted: Option<View>,
    /// What the core was last told that the kernel uses.
    pub(super) in_use: Option<Option<Ipv4Net>>,
    pub(super) withdrawn: bool,
    pub(super) goals: u64,
    pub(super) answered: u64,
    /// The device has been made equal to the view at least once.
    pub(super) programmed_once: bool,
    pub(super) problem: Option<String>,
    pub(super) operations: u64,
    pub(super) next: Option<Instant>,
}

impl Agent {
    pub(super) fn program(&mut self) {
        let Chosen { link, local, mtu, .. } = self.underlay;
        let state = match (&self.kernel.wanted, self.node.cluster()) {
            (Some(view), _) => State::Overlay(Desired::new(view, &Underlay { link, local, mtu })),
            (None, Some(cluster)) if self.kernel.withdrawn => {
                State::Nothing(device_name(cluster.settings.vni))
            }
            _ => return,
        };
        self.kernel.goals += 1;
        self.kernel.next = Some(Instant::now() + RECONCILE);
        self.programmer.program(Goal { number: self.kernel.goals, state });
    }

    pub(super) fn on_kernel(&mut self, Outcome { number, result }: Outcome) {
        self.kernel.answered = number;
        match result {
            Ok(report) => {
                self.kernel.operations += report.done as u64;
                if report.done > 0 {
                    tracing::debug!(operations = report.done, "kernel programmed");
                }
                self.note_kernel_failures(&report.failed);
                self.tell_what_is_in_use();
                if self.kernel.withdrawn {
                    let _ = std::fs::remove_file(&self.config.subnet_file);
                    return;
                }
                if !self.kernel.programmed_once {
                    self.kernel.programmed_once = true;
                    tracing::info!("data plane ready");
                }
                self.write_subnet_env();
            }
            Err(error) => {
                self.kernel.next = Some(Instant::now() + RECONCILE_RETRY);
                self.on_kernel_error(&error);
            }
        }
    }

    /// The core gives a subnet away only when the kernel does not use it any more.
    fn tell_what_is_in_use(&mut self) {
        if self.kernel.answered != self.kernel.goals {
            return;
        }
        let in_use = self.kernel.wanted.as_ref().map(|view| view.own.subnet);
        if self.kernel.in_use.replace(in_use) != Some(in_use) {
            self.input(Input::InUse(in_use));
        }
    }

    fn note_kernel_failures(&mut self, failed: &[String]) {
        let problem = failed.first().map(|first| match failed.len() {
            1 => format!("a kernel entry was refused: {first}"),
            count => format!("{count} kernel entries were refused, the first: {first}"),
        });
        if problem.is_some() {
            self.kernel.next = Some(Instant::now() + RECONCILE_RETRY);
        }
        if let Some(problem) = problem.as_ref().filter(|p| self.kernel.problem.as_ref() != Some(p))
        {
            tracing::error!("{problem}");
        }
        self.kernel.problem = problem;
    }

    /// Before the first success this host cannot be a member: say why and go. Later on, keep trying.
    fn on_kernel_error(&mut self, error: &KernelError) {
        let why = error.to_string();
        if self.kernel.problem.as_ref() != Some(&why) {
            tracing::error!("{why}");
        }
        self.kernel.problem = Some(why.clone());
        if self.kernel.programmed_once || self.giving_up.is_some() {
            return;
        }
        if self.fresh {
            tracing::info!("giving the subnet back");
            self.giving_up = Some((why, Instant::now() + GIVE_BACK));
            // What was refused is not there.
            self.input(Input::InUse(None));
            self.input(Input::Command(Command::Leave));
        } else {
            self.ending = Some(Ending::Failed(why));
        }
    }

    fn write_subnet_env(&self) {
        let Some(view) = &self.kernel.wanted else { return };
        let network = view.settings.pool.network();
        let path = &self.config.subnet_file;
        if let Err(error) = subnet_env::write(path, network, view.own.subnet, self.underlay.mtu) {
            tracing::error!(file = %path.display(), %error, "subnet file not written");
        }
    }
}
