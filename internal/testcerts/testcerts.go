// Package testcerts makes directories of TLS certificates for tests, laid out
// as QEMU and nbdkit have them.
package testcerts

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority signs certificates.
type Authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
	last int64 // serial number
}

// New makes an authority.
func New(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{t: t}
	der, key := a.sign("authority", func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid = true, true
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	})
	cert, err := x509.ParseCertificate(der)
	a.must(err)
	a.cert, a.key = cert, key
	return a
}

func (a *Authority) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

// sign makes a certificate and its key.
func (a *Authority) sign(name string, change func(*x509.Certificate)) (der []byte, key crypto.Signer) {
	a.t.Helper()
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	a.must(err)
	a.last++
	c := &x509.Certificate{
		SerialNumber: big.NewInt(a.last), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, // QEMU wants both
	}
	change(c)
	parent, signer := c, crypto.Signer(own)
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err = x509.CreateCertificate(rand.Reader, c, parent, own.Public(), signer)
	a.must(err)
	return der, own
}

// Server makes a directory with the certificate of localhost.
func (a *Authority) Server(dir string) {
	a.t.Helper()
	a.pair(dir, "server", "localhost", func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
}

// Client makes a directory with the certificate of a client, whose serial number
// it returns.
func (a *Authority) Client(dir, name string) int64 {
	a.t.Helper()
	a.pair(dir, "client", name, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})
	return a.last
}

func (a *Authority) pair(dir, role, name string, change func(*x509.Certificate)) {
	a.t.Helper()
	der, key := a.sign(name, change)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	a.must(err)
	a.write(dir, "ca-cert.pem", "CERTIFICATE", a.cert.Raw)
	a.write(dir, role+"-cert.pem", "CERTIFICATE", der)
	a.write(dir, role+"-key.pem", "PRIVATE KEY", pkcs8)
}

// Revoke writes a list of the certificates with these serial numbers, which is
// good until a time.
func (a *Authority) Revoke(dir string, until time.Time, serials ...int64) {
	a.t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: until}
	for _, s := range serials {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now().Add(-time.Hour)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, a.cert, a.key)
	a.must(err)
	a.write(dir, "ca-crl.pem", "X509 CRL", der)
}

func (a *Authority) write(dir, name, kind string, der []byte) {
	a.t.Helper()
	a.must(os.MkdirAll(dir, 0o700))
	a.must(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}
