//! Compares the types of the API with the JSON schema in `docs/schema/api.json`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::Value;

use super::{
    AgentStatus, ApiError, ClusterToken, Forgotten, IdentityReset, Left, Matrix, MatrixRow,
    PastEvents, PingReport, Pods, Released, Routes, Samples, Secrets,
};
use crate::model::{ClusterId, Mac, NodeId, OwnerChange, Pool};

/// The answers by path and command. A field is no part of any answer.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct Api {
    /// `GET /v1/status`, `gossamer status`.
    status: AgentStatus,
    /// `GET /v1/pods`, `gossamer pods`.
    pods: Pods,
    /// `GET /v1/ping`: one round of `gossamer ping`.
    ping: PingReport,
    /// `GET /v1/peer`.
    peer: Option<MatrixRow>,
    /// `GET /v1/matrix`.
    matrix: Matrix,
    /// `GET /v1/samples`.
    samples: Samples,
    /// `GET /v1/events?follow=false`. Each message of the stream is one of the events.
    events: PastEvents,
    /// `GET /v1/routes`, `gossamer routes`.
    routes: Routes,
    /// `GET /v1/history`, `gossamer leases --history`.
    history: Vec<OwnerChange>,
    /// `GET /v1/token`, `gossamer token`.
    token: ClusterToken,
    /// `GET /v1/secrets`, `POST /v1/secrets/add`, `use` and `drop`; `gossamer secret`.
    secrets: Secrets,
    /// `POST /v1/forget`, `gossamer forget`.
    forgotten: Forgotten,
    /// `POST /v1/leave`, `gossamer leave`.
    left: Left,
    /// `POST /v1/reset-identity`, `gossamer reset-identity`.
    reset: IdentityReset,
    /// `POST /v1/pods/release`, `gossamer pods --release`.
    released: Released,
    /// Every refused request.
    error: ApiError,
}

/// Defines the schema of types that are strings in JSON.
macro_rules! strings {
    ($($name:ident = $pattern:literal),* $(,)?) => {$(
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    )*};
}

strings! {
    NodeId = "^[0-9a-f]{16}$",
    ClusterId = "^[0-9a-f]{16}$",
    Mac = "^([0-9a-f]{2}:){5}[0-9a-f]{2}$",
}

impl JsonSchema for Pool {
    fn schema_name() -> Cow<'static, str> {
        "Pool".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "properties": {
                "network": { "type": "string" },
                "subnet_len": { "type": "integer" },
                "network6": { "type": ["string", "null"] },
                "subnet_len6": { "type": ["integer", "null"] },
                "first": { "type": "integer" },
                "last": { "type": "integer" },
            },
            "required": ["network", "subnet_len", "first", "last"],
        })
    }
}

#[test]
fn answers_have_the_documented_schema() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/schema/api.json");
    let schema: Value = schemars::schema_for!(Api).into();
    if std::env::var_os("GOSSAMER_WRITE_SCHEMA").is_some() {
        std::fs::write(path, format!("{schema:#}\n")).expect("the schema is written");
    }
    let text = std::fs::read_to_string(path).expect("the schema");
    let documented: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        documented, schema,
        "the answers have changed: write the schema with GOSSAMER_WRITE_SCHEMA=1, and see that only \
         fields were added"
    );
}
