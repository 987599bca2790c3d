//! Attributes of `nf_tables` messages (`linux/netfilter/nf_tables.h`), without the prefix `NFTA_`.

/// `NFTA_TABLE_NAME`.
pub const TABLE_NAME: u16 = 1;
/// `NFTA_TABLE_FLAGS`.
pub const TABLE_FLAGS: u16 = 2;
/// `NFTA_CHAIN_TABLE`.
pub const CHAIN_TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`.
pub const CHAIN_NAME: u16 = 3;
/// `NFTA_CHAIN_HOOK`.
pub const CHAIN_HOOK: u16 = 4;
/// `NFTA_CHAIN_POLICY`.
pub const CHAIN_POLICY: u16 = 5;
/// `NFTA_CHAIN_TYPE`.
pub const CHAIN_TYPE: u16 = 7;
/// `NFTA_HOOK_HOOKNUM`.
pub const HOOK_HOOKNUM: u16 = 1;
/// `NFTA_HOOK_PRIORITY`.
pub const HOOK_PRIORITY: u16 = 2;
/// `NFTA_HOOK_DEV`.
pub const HOOK_DEV: u16 = 3;
/// `NFTA_HOOK_DEVS`.
pub const HOOK_DEVS: u16 = 4;
/// `NFTA_RULE_TABLE`.
pub const RULE_TABLE: u16 = 1;
/// `NFTA_RULE_CHAIN`.
pub const RULE_CHAIN: u16 = 2;
/// `NFTA_RULE_HANDLE`.
pub const RULE_HANDLE: u16 = 3;
/// `NFTA_RULE_EXPRESSIONS`.
pub const RULE_EXPRESSIONS: u16 = 4;
/// `NFTA_LIST_ELEM`.
pub const LIST_ELEM: u16 = 1;
/// `NFTA_EXPR_NAME`.
pub const EXPR_NAME: u16 = 1;
/// `NFTA_EXPR_DATA`.
pub const EXPR_DATA: u16 = 2;
/// `NFTA_DATA_VALUE`.
pub const DATA_VALUE: u16 = 1;
/// `NFTA_DATA_VERDICT`.
pub const DATA_VERDICT: u16 = 2;
/// `NFTA_VERDICT_CODE`.
pub const VERDICT_CODE: u16 = 1;
/// `NFTA_VERDICT_CHAIN`.
pub const VERDICT_CHAIN: u16 = 2;
/// `NFTA_IMMEDIATE_DREG`.
pub const IMMEDIATE_DREG: u16 = 1;
/// `NFTA_IMMEDIATE_DATA`.
pub const IMMEDIATE_DATA: u16 = 2;
/// `NFTA_BITWISE_SREG`.
pub const BITWISE_SREG: u16 = 1;
/// `NFTA_BITWISE_DREG`.
pub const BITWISE_DREG: u16 = 2;
/// `NFTA_BITWISE_LEN`.
pub const BITWISE_LEN: u16 = 3;
/// `NFTA_BITWISE_MASK`.
pub const BITWISE_MASK: u16 = 4;
/// `NFTA_BITWISE_XOR`.
pub const BITWISE_XOR: u16 = 5;
/// `NFTA_BYTEORDER_SREG`.
pub const BYTEORDER_SREG: u16 = 1;
/// `NFTA_BYTEORDER_DREG`.
pub const BYTEORDER_DREG: u16 = 2;
/// `NFTA_CMP_SREG`.
pub const CMP_SREG: u16 = 1;
/// `NFTA_CMP_OP`.
pub const CMP_OP: u16 = 2;
/// `NFTA_CMP_DATA`.
pub const CMP_DATA: u16 = 3;
/// `NFTA_RANGE_SREG`.
pub const RANGE_SREG: u16 = 1;
/// `NFTA_RANGE_OP`.
pub const RANGE_OP: u16 = 2;
/// `NFTA_RANGE_FROM_DATA`.
pub const RANGE_FROM_DATA: u16 = 3;
/// `NFTA_RANGE_TO_DATA`.
pub const RANGE_TO_DATA: u16 = 4;
/// `NFTA_LOOKUP_SET`.
pub const LOOKUP_SET: u16 = 1;
/// `NFTA_LOOKUP_SREG`.
pub const LOOKUP_SREG: u16 = 2;
/// `NFTA_LOOKUP_DREG`.
pub const LOOKUP_DREG: u16 = 3;
/// `NFTA_LOOKUP_FLAGS`.
pub const LOOKUP_FLAGS: u16 = 5;
/// `NFTA_PAYLOAD_DREG`.
pub const PAYLOAD_DREG: u16 = 1;
/// `NFTA_PAYLOAD_BASE`.
pub const PAYLOAD_BASE: u16 = 2;
/// `NFTA_PAYLOAD_OFFSET`.
pub const PAYLOAD_OFFSET: u16 = 3;
/// `NFTA_PAYLOAD_LEN`.
pub const PAYLOAD_LEN: u16 = 4;
/// `NFTA_PAYLOAD_SREG`.
pub const PAYLOAD_SREG: u16 = 5;
/// `NFTA_META_DREG`.
pub const META_DREG: u16 = 1;
/// `NFTA_META_KEY`.
pub const META_KEY: u16 = 2;
/// `NFTA_META_SREG`.
pub const META_SREG: u16 = 3;
/// `NFTA_CT_KEY`.
pub const CT_KEY: u16 = 2;
/// `NFTA_CT_SREG`.
pub const CT_SREG: u16 = 4;
/// `NFTA_FIB_RESULT`.
pub const FIB_RESULT: u16 = 2;
/// `NFTA_FIB_FLAGS`.
pub const FIB_FLAGS: u16 = 3;
/// `NFTA_HASH_DREG`.
pub const HASH_DREG: u16 = 2;
/// `NFTA_COUNTER_BYTES`.
pub const COUNTER_BYTES: u16 = 1;
/// `NFTA_COUNTER_PACKETS`.
pub const COUNTER_PACKETS: u16 = 2;
/// `NFTA_LIMIT_RATE`.
pub const LIMIT_RATE: u16 = 1;
/// `NFTA_LIMIT_UNIT`.
pub const LIMIT_UNIT: u16 = 2;
/// `NFTA_LIMIT_BURST`.
pub const LIMIT_BURST: u16 = 3;
/// `NFTA_LIMIT_FLAGS`.
pub const LIMIT_FLAGS: u16 = 5;
/// `NFTA_REJECT_TYPE`.
pub const REJECT_TYPE: u16 = 1;
/// `NFTA_REJECT_ICMP_CODE`.
pub const REJECT_ICMP_CODE: u16 = 2;
/// `NFTA_MASQ_FLAGS`.
pub const MASQ_FLAGS: u16 = 1;
/// `NFTA_NAT_TYPE`.
pub const NAT_TYPE: u16 = 1;
/// `NFTA_QUEUE_NUM`.
pub const QUEUE_NUM: u16 = 1;
/// `NFTA_QUEUE_TOTAL`.
pub const QUEUE_TOTAL: u16 = 2;
/// `NFTA_QUEUE_FLAGS`.
pub const QUEUE_FLAGS: u16 = 3;
/// `NFTA_MATCH_INFO`.
pub const MATCH_INFO: u16 = 3;
/// `NFTA_TARGET_NAME`.
pub const TARGET_NAME: u16 = 1;
/// `NFTA_TARGET_REV`.
pub const TARGET_REV: u16 = 2;
/// `NFTA_TARGET_INFO`.
pub const TARGET_INFO: u16 = 3;
/// `NFTA_OBJREF_IMM_TYPE`.
pub const OBJREF_IMM_TYPE: u16 = 1;
/// `NFTA_DYNSET_EXPR`.
pub const DYNSET_EXPR: u16 = 7;
/// `NFTA_DYNSET_EXPRESSIONS`. Kernels since 5.11 list several expressions.
pub const DYNSET_EXPRESSIONS: u16 = 10;
/// `NFTA_SET_TABLE`.
pub const SET_TABLE: u16 = 1;
/// `NFTA_SET_NAME`.
pub const SET_NAME: u16 = 2;
/// `NFTA_SET_FLAGS`.
pub const SET_FLAGS: u16 = 3;
/// `NFTA_SET_KEY_TYPE`.
pub const SET_KEY_TYPE: u16 = 4;
/// `NFTA_SET_KEY_LEN`.
pub const SET_KEY_LEN: u16 = 5;
/// `NFTA_SET_ID`.
pub const SET_ID: u16 = 10;
/// `NFTA_SET_EXPR`. An expression that runs for each element that matches; kernels before 5.7 ignore it.
pub const SET_EXPR: u16 = 17;
/// `NFTA_SET_ELEM_KEY`.
pub const SET_ELEM_KEY: u16 = 1;
/// `NFTA_SET_ELEM_DATA`.
pub const SET_ELEM_DATA: u16 = 2;
/// `NFTA_SET_ELEM_FLAGS`.
pub const SET_ELEM_FLAGS: u16 = 3;
/// `NFTA_SET_ELEM_EXPR`.
pub const SET_ELEM_EXPR: u16 = 7;
/// `NFTA_SET_ELEM_KEY_END`.
pub const SET_ELEM_KEY_END: u16 = 10;
/// `NFTA_SET_ELEM_LIST_TABLE`.
pub const SET_ELEM_LIST_TABLE: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`.
pub const SET_ELEM_LIST_SET: u16 = 2;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`.
pub const SET_ELEM_LIST_ELEMENTS: u16 = 3;
