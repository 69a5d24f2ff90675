//! Digests and signatures that requests are signed with, without any C.

use hmac::{Hmac, KeyInit, Mac};
use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm,
};
use object_store::{Error, Result};
use sha2::{Digest, Sha256};

/// Bytes of the largest RSA key that signs: 8192 bits.
const MAX_RSA_BYTES: usize = 1024;

#[derive(Debug)]
pub(super) struct Crypto;

impl CryptoProvider for Crypto {
    fn digest(&self, algorithm: DigestAlgorithm) -> Result<Box<dyn DigestContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => Ok(Box::new(Summed { state: Sha256::new(), done: Vec::new() })),
            _ => Err(unknown()),
        }
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> Result<Box<dyn HmacContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => {
                let state = Hmac::<Sha256>::new_from_slice(secret).map_err(failed)?;
                Ok(Box::new(Summed { state, done: Vec::new() }))
            }
            _ => Err(unknown()),
        }
    }

    fn sign(&self, algorithm: SigningAlgorithm, pem: &[u8]) -> Result<Box<dyn Signer>> {
        if !matches!(algorithm, SigningAlgorithm::RS256) {
            return Err(unknown());
        }
        super::http::check_cpu().map_err(failed)?;
        Ok(Box::new(Rsa(rsa_key(pem).map_err(failed)?)))
    }
}

/// A digest or a tag on the way, and what it came to.
struct Summed<S> {
    state: S,
    done: Vec<u8>,
}

impl DigestContext for Summed<Sha256> {
    fn update(&mut self, data: &[u8]) {
        Digest::update(&mut self.state, data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.done = self.state.finalize_reset().to_vec();
        Ok(&self.done)
    }
}

impl HmacContext for Summed<Hmac<Sha256>> {
    fn update(&mut self, data: &[u8]) {
        Mac::update(&mut self.state, data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.done = self.state.clone().finalize().into_bytes().to_vec();
        Ok(&self.done)
    }
}

struct Rsa(graviola::signing::rsa::SigningKey);

impl Signer for Rsa {
    fn sign(&self, text: &[u8]) -> Result<Vec<u8>> {
        let mut room = [0; MAX_RSA_BYTES];
        let signed = self.0.sign_pkcs1_sha256(&mut room, text);
        signed.map(<[u8]>::to_vec).map_err(|e| failed(format!("sign: {e:?}")))
    }
}

/// The RSA key in a service account's PEM text.
fn rsa_key(pem: &[u8]) -> Result<graviola::signing::rsa::SigningKey, String> {
    use graviola::signing::rsa::SigningKey;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject;
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| format!("read private key: {e}"))?;
    let read = match &key {
        PrivateKeyDer::Pkcs1(der) => SigningKey::from_pkcs1_der(der.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(der) => SigningKey::from_pkcs8_der(der.secret_pkcs8_der()),
        _ => return Err("the private key is not an RSA key".to_owned()),
    };
    read.map_err(|e| format!("read private key: {e:?}"))
}

fn unknown() -> Error {
    failed("an algorithm that this program does not have")
}

fn failed(why: impl std::fmt::Display) -> Error {
    Error::Generic { store: "signing", source: why.to_string().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standards() {
        // FIPS 180-2, appendix B.1.
        let mut sha = Crypto.digest(DigestAlgorithm::Sha256).unwrap();
        sha.update(b"a");
        sha.update(b"bc");
        assert_eq!(
            hex(sha.finish().unwrap()),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        // RFC 4231, test case 2.
        let mut tag = Crypto.hmac(DigestAlgorithm::Sha256, b"Jefe").unwrap();
        tag.update(b"what do ya want ");
        tag.update(b"for nothing?");
        assert_eq!(
            hex(tag.finish().unwrap()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert!(Crypto.sign(SigningAlgorithm::RS256, b"no key").is_err());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}
