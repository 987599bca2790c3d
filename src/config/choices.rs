//! The values of settings whose types belong to the pure ring, as the command line names them.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::dataplane::{demand::Program, desired::Mode};

/// Returns the command line's parser of `mode`.
pub(super) fn mode() -> impl TypedValueParser<Value = Mode> {
    one_of([
        ("vxlan", "Always through a tunnel", Mode::Vxlan),
        (
            "direct",
            "Without a tunnel if the peer is on the same underlay network, otherwise through one",
            Mode::Direct,
        ),
        (
            "host-gw",
            "Never through a tunnel: peers on other networks are unreachable",
            Mode::HostGw,
        ),
    ])
}

/// Returns the command line's parser of `program`.
pub(super) fn program() -> impl TypedValueParser<Value = Program> {
    one_of([
        ("all", "All peers, always", Program::All),
        ("on-demand", "A peer from the first packet to it until it is idle", Program::OnDemand),
    ])
}

/// Returns a parser of values that each have a name and a help text.
fn one_of<T, const N: usize>(
    values: [(&'static str, &'static str, T); N],
) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    let names = values.map(|(name, help, _)| PossibleValue::new(name).help(help));
    PossibleValuesParser::new(names).try_map(move |text| {
        let named = values.iter().find(|(name, ..)| *name == text);
        named.map(|(_, _, value)| *value).ok_or("not one of the values")
    })
}
