//! The problem of seeds that are addresses of this host.

use super::{Problem, ProblemCode};

/// Returns the problem that these seeds are addresses of this host. `of_token`: they come from the token.
pub fn own_address_problem(seeds: &[&str], of_token: bool) -> Problem {
    let (of, is) = match (of_token, seeds.len()) {
        (true, 1) => ("the token's address", "is"),
        (true, _) => ("the token's addresses", "are"),
        (false, 1) => ("the seed", "is"),
        (false, _) => ("the seeds", "are"),
    };
    let seeds = seeds.join(", ");
    let what = format!(
        "{of} {seeds} {is} this host's own, so no member is found there (/etc/hosts may map a name to this \
         host, and virtual machines that are each behind their own NAT have the same address)"
    );
    let fix = "name a member by an address that this host reaches (--join ADDRESS). Or start the member \
               that made the token with --iface NAME or --advertise ADDRESS, and use a new token of \
               that member (gossamer token)";
    Problem::new(ProblemCode::OwnAddressSeed, seeds, what, fix)
}
