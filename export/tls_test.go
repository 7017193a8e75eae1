package export

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/internal/testcerts"
)

// certified is a directory of a server's certificates, its authority, and the
// configuration of a client that the authority has signed.
func certified(t *testing.T) (dir string, a *testcerts.Authority, client *tls.Config, serial int64) {
	t.Helper()
	dir, mine := t.TempDir(), t.TempDir()
	a = testcerts.New(t)
	a.Server(dir)
	serial = a.Client(mine, "tester")
	return dir, a, clientConfig(t, mine), serial
}

// clientConfig is that of a client with the certificates in dir.
func clientConfig(t *testing.T, dir string) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	c := &tls.Config{ServerName: "localhost", RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	ca, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil || !c.RootCAs.AppendCertsFromPEM(ca) {
		t.Fatal(err)
	}
	return c
}

func mustTLS(t *testing.T, opt TLSOptions) *tls.Config {
	t.Helper()
	c, err := NewTLS(opt)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func withTLS(c *tls.Config) func(*handshake) { return func(h *handshake) { h.tls = c } }

// startTLS has the client's side change to TLS.
func (p *peer) startTLS(c *tls.Config) error {
	p.t.Helper()
	p.final(wire.OptStartTLS, nil, wire.RepAck)
	secure := tls.Client(p.nc, c)
	if err := secure.Handshake(); err != nil {
		return err
	}
	p.nc = secure
	return nil
}

// Without TLS a client learns nothing but that it is required; with it all is
// as ever, and nothing of before counts.
func TestStartTLS(t *testing.T) {
	dir, _, client, _ := certified(t)
	x, _ := testExports(t)
	p, done := greeted(t, x, withTLS(mustTLS(t, TLSOptions{Dir: dir})))
	for _, opt := range []uint32{wire.OptList, wire.OptStructuredReply, wire.OptGo, wire.OptInfo, wire.OptSetMetaContext, wire.OptListMetaContext, 99} {
		p.final(opt, nil, wire.RepErrTLSReqd)
	}
	p.final(wire.OptStartTLS, []byte("x"), wire.RepErrInvalid)
	if err := p.startTLS(client); err != nil {
		t.Fatal(err)
	}
	p.inSync()
	p.final(wire.OptStartTLS, nil, wire.RepErrInvalid)
	p.inSync()
	p.do(wire.OptGo, goData(""))
	o := <-done
	if o.err != nil || o.export == nil || o.secure == nil || o.terms.structured {
		t.Fatalf("%+v", o)
	}
	if who := o.certificate(); who != "CN=tester" {
		t.Errorf("the client is %q", who)
	}
}

func TestTLSIsRequired(t *testing.T) {
	dir, _, _, _ := certified(t)
	x, _ := testExports(t)
	p, done := greeted(t, x, withTLS(mustTLS(t, TLSOptions{Dir: dir})))
	p.send(wire.OptExportName, nil)
	p.closed()
	if o := <-done; o.err == nil || !strings.Contains(o.err.Error(), "requires TLS") {
		t.Errorf("%+v", o)
	}
	p, done = greeted(t, x, withTLS(mustTLS(t, TLSOptions{Dir: dir})))
	p.final(wire.OptAbort, nil, wire.RepAck)
	if o := <-done; o.err != errAbort {
		t.Errorf("%+v", o)
	}
}

// What was agreed in the open is forgotten: structured replies, contexts.
func TestStartTLSForgets(t *testing.T) {
	dir, _, client, _ := certified(t)
	x, _ := testExports(t)
	p, done := greeted(t, x, withTLS(mustTLS(t, TLSOptions{Dir: dir})), func(h *handshake) {
		h.structured, h.last.valid = true, true
	})
	if err := p.startTLS(client); err != nil {
		t.Fatal(err)
	}
	p.do(wire.OptGo, goData(""))
	if o := <-done; o.err != nil || o.terms.structured {
		t.Errorf("%+v", o)
	}
}

// Who may connect. A client of TLS 1.3 learns that it may not only by reading.
func TestTLSClients(t *testing.T) {
	dir, authority, known, serial := certified(t)
	_, _, stranger, _ := certified(t)
	stranger.RootCAs = known.RootCAs
	nobody := known.Clone()
	nobody.Certificates = nil
	revoking := func(until time.Time, serials ...int64) string {
		d := t.TempDir()
		authority.Server(d)
		authority.Revoke(d, until, serials...)
		return d
	}
	later := time.Now().Add(time.Hour)
	x, _ := testExports(t)
	for name, c := range map[string]struct {
		opt    TLSOptions
		client *tls.Config
		want   string // of the server's error
	}{
		"known":            {TLSOptions{Dir: dir}, known, ""},
		"stranger":         {TLSOptions{Dir: dir}, stranger, "certificate signed by unknown authority"},
		"nobody":           {TLSOptions{Dir: dir}, nobody, "didn't provide a certificate"},
		"anybody":          {TLSOptions{Dir: dir, AnyClient: true}, nobody, ""},
		"revoked":          {TLSOptions{Dir: revoking(later, 99, serial)}, known, "CN=tester was revoked"},
		"another revoked":  {TLSOptions{Dir: revoking(later, serial+100)}, known, ""},
		"list out of date": {TLSOptions{Dir: revoking(time.Now().Add(-time.Hour))}, known, "out of date"},
	} {
		t.Run(name, func(t *testing.T) {
			p, done := greeted(t, x, withTLS(mustTLS(t, c.opt)))
			err := p.startTLS(c.client)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				p.inSync()
				_ = p.nc.Close()
				<-done
				return
			}
			if err == nil {
				p.cutOff()
			}
			if o := <-done; o.err == nil || !strings.Contains(o.err.Error(), c.want) {
				t.Errorf("got %v, want %q", o.err, c.want)
			}
		})
	}
}

// cutOff reads until the server ends a TLS connection that it refuses.
func (p *peer) cutOff() {
	p.t.Helper()
	if n, err := p.nc.Read(make([]byte, 1)); err == nil {
		p.t.Errorf("read %d bytes", n)
	}
}

// What is wrong with the files is said at the start; a renewed certificate
// counts from the next client on.
func TestTLSFiles(t *testing.T) {
	dir, _, client, _ := certified(t)
	c := mustTLS(t, TLSOptions{Dir: dir})
	other := testcerts.New(t)
	theirs := t.TempDir()
	other.Client(theirs, "tester")
	x, _ := testExports(t)
	connect := func(client *tls.Config) error {
		p, done := greeted(t, x, withTLS(c))
		err := p.startTLS(client)
		_ = p.nc.Close()
		<-done
		return err
	}
	if err := connect(client); err != nil {
		t.Fatal(err)
	}
	other.Server(dir) // by another authority
	if err := connect(client); err == nil {
		t.Error("the old certificate is still used")
	}
	if err := connect(clientConfig(t, theirs)); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"server-cert.pem", "server-key.pem", "ca-cert.pem"} {
		broken := t.TempDir()
		other.Server(broken)
		if err := os.Remove(filepath.Join(broken, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := NewTLS(TLSOptions{Dir: broken}); err == nil || !strings.Contains(err.Error(), broken+": "+name+": no such file") {
			t.Errorf("%s: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(broken, name), []byte("none"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := NewTLS(TLSOptions{Dir: broken}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bad := t.TempDir()
	other.Server(bad)
	if err := os.WriteFile(filepath.Join(bad, "ca-crl.pem"), []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewTLS(TLSOptions{Dir: bad}); err == nil || !strings.Contains(err.Error(), "ca-crl.pem: there is no revocation list in it") {
		t.Error(err)
	}
}
