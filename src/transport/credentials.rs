//! Derives certificates from the cluster's secret. A handshake succeeds only between nodes with the
//! same secret.
//!
//! The private key of a certificate authority, the same on all nodes, is derived from the secret
//! with HKDF-SHA256. Each node issues a certificate for its own Ed25519 key. Both sides of a
//! handshake verify each other; a peer's [`NodeId`] is the hash of the key that it has proven to
//! hold. Certificates are valid from 1970 to 9999, so that a wrong clock excludes no node.

use std::{fmt, sync::Arc};

use hkdf::Hkdf;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, SerialNumber,
    date_time_ymd,
};
use rustls::{
    RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use sha2::Sha256;

use super::first_id::FirstIds;
use crate::{
    model::NodeId,
    wire::{Secret, WIRE_VERSION},
};

/// The name in all certificates. The signature proves membership, not the name.
pub(super) const SERVER_NAME: &str = "gossamer";

/// Header of a PKCS#8 v1 structure with an Ed25519 seed (RFC 8410).
const PKCS8_ED25519: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// A node's private key, which is its permanent identity.
#[derive(Clone)]
pub struct NodeKey {
    seed: [u8; 32],
    id: NodeId,
}

impl NodeKey {
    /// Creates the key from its seed.
    ///
    /// # Errors
    /// When the cryptographic library rejects the key.
    pub fn from_seed(seed: [u8; 32]) -> Result<Self, CredentialError> {
        let public = key_pair(&seed)?.public_key_raw().to_vec();
        let public = <[u8; 32]>::try_from(public).map_err(|_| CredentialError::Key)?;
        Ok(Self { seed, id: NodeId::of_public_key(&public) })
    }

    /// Returns the seed, which is secret.
    pub const fn seed(&self) -> &[u8; 32] {
        &self.seed
    }

    /// Returns the node id, the hash of the public key.
    pub const fn id(&self) -> NodeId {
        self.id
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.id)
    }
}

/// TLS configuration for both roles.
#[derive(Clone)]
pub struct Credentials {
    /// Key of stateless reset tokens. It survives a restart, so that peers with connections to the
    /// previous process learn at once that these have ended (RFC 9000, 10.3).
    pub(super) reset_key: [u8; 64],
    pub(super) server: Arc<QuicServerConfig>,
    pub(super) client: Arc<QuicClientConfig>,
    pub(super) first_ids: FirstIds,
    verifier: Arc<dyn ClientCertVerifier>,
    pub(super) me: NodeId,
}

/// A failure of the cryptographic libraries, which valid input does not cause.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A certificate could not be created.
    #[error("certificates: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS configuration is invalid.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The verifier of client certificates could not be created.
    #[error("TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// QUIC's initial cipher suite is missing.
    #[error("TLS: {0}")]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The key is not an Ed25519 key.
    #[error("the key is not an Ed25519 key")]
    Key,
}

impl Credentials {
    /// Creates the configuration. Peers with any of the secrets are accepted; the first is used for this
    /// node's certificate.
    ///
    /// # Errors
    /// When `secrets` is empty or a cryptographic library fails.
    pub fn new(secrets: &[Secret], key: &NodeKey) -> Result<Self, CredentialError> {
        let in_use = secrets.first().ok_or(CredentialError::Key)?;
        let (_, issuer) = authority(in_use)?;
        let leaf_key = key_pair(&key.seed)?;
        let leaf = leaf_params()?.signed_by(&leaf_key, &issuer)?;
        let chain = vec![leaf.der().clone()];
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8(&key.seed)));

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for secret in secrets {
            roots.add(authority(secret)?.0.der().clone())?;
        }
        let roots = Arc::new(roots);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier.clone())
            .with_single_cert(chain.clone(), private.clone_key())?;
        server.send_tls13_tickets = 0;
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, private)?;
        client.resumption = Resumption::disabled();
        let keys: Result<Vec<_>, _> = secrets
            .iter()
            .map(|secret| derive(secret.as_bytes(), b"connection ids of first packets, hmac key"))
            .collect();
        let protocol = format!("gossamer/{WIRE_VERSION}").into_bytes();
        server.alpn_protocols = vec![protocol.clone()];
        client.alpn_protocols = vec![protocol];
        Ok(Self {
            reset_key: derive(&key.seed, b"stateless reset")?,
            server: Arc::new(QuicServerConfig::try_from(server)?),
            client: Arc::new(QuicClientConfig::try_from(client)?),
            first_ids: FirstIds::new(&keys?),
            verifier,
            me: key.id,
        })
    }

    /// Whether the peer of a connection would still be accepted.
    pub(super) fn accepts(&self, connection: &quinn::Connection) -> bool {
        let chain = chain_of(connection).unwrap_or_default();
        let Some((leaf, more)) = chain.split_first() else { return false };
        self.verifier.verify_client_cert(leaf, more, UnixTime::now()).is_ok()
    }
}

/// Returns the peer's certificate chain.
fn chain_of(connection: &quinn::Connection) -> Option<Vec<CertificateDer<'static>>> {
    connection.peer_identity()?.downcast().ok().map(|chain| *chain)
}

/// Returns the id of the peer of an established connection.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<NodeId> {
    let chain = chain_of(connection)?;
    let leaf = ParsedCertificate::try_from(chain.first()?).ok()?;
    // In the SubjectPublicKeyInfo of Ed25519, twelve fixed bytes precede the key (RFC 8410).
    let info = leaf.subject_public_key_info();
    let key = info.get(12..)?;
    Some(NodeId::of_public_key(key.try_into().ok()?))
}

/// Returns the certificate authority of a secret.
fn authority(secret: &Secret) -> Result<(Certificate, Issuer<'static, KeyPair>), CredentialError> {
    let key =
        key_pair(&derive(secret.as_bytes(), b"cluster certificate authority, ed25519 seed")?)?;
    let mut params = common_params(CertificateParams::default());
    params.distinguished_name = common_name("gossamer cluster");
    params.serial_number = Some(SerialNumber::from(1_u64));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let certificate = params.self_signed(&key)?;
    Ok((certificate, Issuer::new(params, key)))
}

/// Derives bytes for one purpose from a secret with HKDF-SHA256 (RFC 5869).
fn derive<const N: usize>(secret: &[u8], purpose: &[u8]) -> Result<[u8; N], CredentialError> {
    let mut bytes = [0; N];
    Hkdf::<Sha256>::new(Some(b"gossamer"), secret)
        .expand(purpose, &mut bytes)
        .map_err(|_| CredentialError::Key)?;
    Ok(bytes)
}

/// Returns the parameters of a node's certificate.
fn leaf_params() -> Result<CertificateParams, CredentialError> {
    let mut params = common_params(CertificateParams::new([SERVER_NAME.to_owned()])?);
    params.distinguished_name = common_name("gossamer node");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn common_params(mut params: CertificateParams) -> CertificateParams {
    params.not_before = date_time_ymd(1970, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn key_pair(seed: &[u8; 32]) -> Result<KeyPair, rcgen::Error> {
    KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(pkcs8(seed)), &PKCS_ED25519)
}

fn pkcs8(seed: &[u8; 32]) -> Vec<u8> {
    [&PKCS8_ED25519[..], seed].concat()
}
