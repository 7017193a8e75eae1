package control

import (
	"strings"
	"testing"
)

func TestParseOptions(t *testing.T) {
	for _, c := range []struct{ in, implied, want string }{
		{"", "", `{}`},
		{"a=1,b=", "", `{"a": "1", "b": ""}`},
		{"file,node-name=x", "driver", `{"driver": "file", "node-name": "x"}`},
		{"driver=raw,file.driver=file,file.cache.direct=on,file.filename=a,,b=c", "driver",
			`{"driver": "raw", "file": {"driver": "file", "cache": {"direct": "on"}, "filename": "a,b=c"}}`},
		{"a=1,a=2", "", `{"a": "2"}`},
		{`{"a":{"b":[true]}}`, "x", `{"a": {"b": [true]}}`},
		{"a", "", "expected '=' after parameter 'a'"},
		{"a=1,b,c=2", "", "expected '=' after parameter 'b'"},
		{"a=1,a.b=2", "", "parameter 'a' is used both as a value and as an object"},
		{"a.b=1,a=2", "", "parameter 'a' is used both as a value and as an object"},
		{"a..b=1", "", "invalid parameter 'a..b'"},
		{"=1", "", "invalid parameter ''"},
		{`{"a":`, "", "JSON parse error, it ends too early"},
		{`{"a":1} {}`, "", "JSON parse error, something follows its end"},
		{`{"a":1} x`, "", "JSON parse error, something follows its end"},
		{`{"a"}`, "", "JSON parse error, missing : in object pair"},
	} {
		o, err := parseOptions(c.in, c.implied)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = strings.TrimSpace(string(appendLine(nil, o)))
		}
		if got != c.want && (c.want != "" || err == nil) {
			t.Errorf("%s: %s, want %s", c.in, got, c.want)
		}
	}
}

// Words become what the arguments are.
func TestRun(t *testing.T) {
	g := newGraph(t)
	s := NewServer(g.config)
	run := func(command, options, want string) {
		t.Helper()
		err := s.Run(command, options)
		if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", options, err, want)
		}
	}
	run("nbd-server-start", "addr.type=inet,addr.host=localhost", "Parameter 'addr.port' is missing")
	run("nbd-server-start", "addr.type=unix,addr.path="+g.dir+"/nbd,max-connections=x", "Parameter 'max-connections' expects integer")
	run("nbd-server-start", "addr.type=unix,addr.path="+g.dir+"/nbd,max-connections=7", "")
	run("blockdev-add", "file,node-name=f,filename=a,active=maybe", "Invalid parameter type for 'active', expected: boolean")
	run("blockdev-add", "file,node-name=f,filename=a", "")
	run("blockdev-add", "raw,node-name=r,file=f,active=off", "")
	run("blockdev-add", `{"driver":"raw","node-name":"q","file":{"driver":"file","filename":"b"}}`, "")
	run("block-export-add", "nbd,id=e,node-name=r,writable=on,allow-inactive=on", "")
	run("block-export-add", "nbd,id=e,node-name=q", "Block export id 'e' is already in use")
	g.nodes("r f! q! #block001!")
	g.owned("a b!")
}
