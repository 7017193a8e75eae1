package export

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

// Names of the files in a directory of certificates: those of QEMU, nbdkit and
// libvirt.
const (
	caCertFile     = "ca-cert.pem"
	caCRLFile      = "ca-crl.pem"
	serverCertFile = "server-cert.pem"
	serverKeyFile  = "server-key.pem"
)

// TLSOptions say how clients are served over TLS.
type TLSOptions struct {
	// Dir has the server's certificate and key (server-cert.pem, server-key.pem),
	// and, to know clients by, that of their authority (ca-cert.pem) and, if there
	// is one, its list of revoked certificates (ca-crl.pem).
	Dir string
	// AnyClient: clients need no certificate.
	AnyClient bool
}

// NewTLS makes what Server.TLS needs. The files are read anew for each client,
// so that a certificate can be renewed while the server runs; the error is that
// of reading them now.
func NewTLS(opt TLSOptions) (*tls.Config, error) {
	load := func() (*tls.Config, error) {
		c, err := loadTLS(opt)
		if err != nil {
			return nil, fmt.Errorf("TLS certificates in %s: %w", opt.Dir, err)
		}
		return c, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return load() },
	}, nil
}

func loadTLS(opt TLSOptions) (*tls.Config, error) {
	read := func(name string) ([]byte, error) {
		b, err := os.ReadFile(filepath.Join(opt.Dir, name))
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			err = fmt.Errorf("%s: %w", name, e.Err)
		}
		return b, err
	}
	cert, err := read(serverCertFile)
	if err != nil {
		return nil, err
	}
	key, err := read(serverKeyFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", serverCertFile, serverKeyFile, err)
	}
	// A client that resumes a session would not be judged by the files as they are.
	c := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, SessionTicketsDisabled: true}
	if opt.AnyClient {
		return c, nil
	}
	ca, err := read(caCertFile)
	if err != nil {
		return nil, fmt.Errorf("%w; clients are known by it, unless any client may connect", err)
	}
	c.ClientCAs, c.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !c.ClientCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s: there is no certificate in it", caCertFile)
	}
	list, err := read(caCRLFile)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	revoked, err := parseCRLs(list)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", caCRLFile, err)
	}
	c.VerifyConnection = func(s tls.ConnectionState) error { return revoked.check(s.VerifiedChains, time.Now()) }
	return c, nil
}

// crls are lists of certificates that their authorities have taken back.
type crls []*x509.RevocationList

func parseCRLs(text []byte) (all crls, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "X509 CRL" {
			continue
		}
		l, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no revocation list in it")
	}
	return all, nil
}

// check refuses a client all of whose chains have a certificate that was taken
// back, or whose authority's list is out of date or not signed by it.
func (l crls) check(chains [][]*x509.Certificate, now time.Time) error {
	var first error
	for _, chain := range chains {
		err := l.checkChain(chain, now)
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	return first
}

func (l crls) checkChain(chain []*x509.Certificate, now time.Time) error {
	for i := range len(chain) - 1 { // the last is what is trusted
		cert, issuer := chain[i], chain[i+1]
		for _, list := range l {
			if !bytes.Equal(list.RawIssuer, cert.RawIssuer) {
				continue
			}
			if err := list.CheckSignatureFrom(issuer); err != nil {
				return fmt.Errorf("the revocation list of %s: %w", issuer.Subject, err)
			}
			if !list.NextUpdate.IsZero() && now.After(list.NextUpdate) {
				return fmt.Errorf("the revocation list of %s is out of date since %s", issuer.Subject, list.NextUpdate)
			}
			if slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool {
				return e.SerialNumber.Cmp(cert.SerialNumber) == 0
			}) {
				return fmt.Errorf("the certificate of %s was revoked", cert.Subject)
			}
		}
	}
	return nil
}

// startTLS is STARTTLS. What was agreed on before is forgotten: whoever sits
// between client and server could have said it.
func (h *handshake) startTLS() error {
	switch {
	case h.tls == nil:
		return h.fail(wire.OptStartTLS, wire.RepErrUnsup, "this server does not use TLS")
	case h.secure != nil:
		return h.fail(wire.OptStartTLS, wire.RepErrInvalid, "TLS is in use already")
	}
	if err := h.reply(wire.OptStartTLS, wire.RepAck, nil); err != nil {
		return err
	}
	if err := h.flush(); err != nil {
		return err
	}
	c := tls.Server(h.conn, h.tls)
	if err := c.Handshake(); err != nil { // the deadline is the connection's
		return fmt.Errorf("TLS: %w", err)
	}
	h.conn, h.secure = c, c
	h.structured, h.meta, h.last = false, selection{}, frozen{}
	return nil
}

// tooOpen answers an option that needs TLS first; done says that it does.
func (h *handshake) tooOpen(opt uint32) (done bool, err error) {
	if h.tls == nil || h.secure != nil || opt == wire.OptStartTLS || opt == wire.OptAbort {
		return false, nil
	}
	const text = "this server requires TLS"
	if opt == wire.OptExportName {
		return true, errors.New("EXPORT_NAME: " + text)
	}
	return true, h.fail(opt, wire.RepErrTLSReqd, text)
}

// certificate is who a client has proven to be, "" for nobody.
func (a *agreement) certificate() string {
	if a.secure == nil {
		return ""
	}
	if certs := a.secure.ConnectionState().PeerCertificates; len(certs) > 0 {
		return certs[0].Subject.String()
	}
	return ""
}
