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
		{"a.1=y,a.0=x,b.0.c=z", "", `{"a": ["x", "y"], "b": [{"c": "z"}]}`},
		{"a.0=x,a.2=y", "", "Parameter 'a.1' missing"},
		{"a.1=x", "", "Parameter 'a.0' missing"},
		{"b.a.0=x,b.a.n=y", "", "Parameters 'b.a.*' used inconsistently"},
		{"b.a.0=x,b.a.0.n=y", "", "Parameters 'b.a.0.*' used inconsistently"},
		{",a=1", "", "Invalid parameter ''"},
		{`{"a":{"b":[true]}}`, "x", `{"a": {"b": [true]}}`},
		{"a", "", "Expected '=' after parameter 'a'"},
		{"a=1,b,c=2", "", "Expected '=' after parameter 'b'"},
		{"a=1,a.b=2", "", "Parameters 'a.*' used inconsistently"},
		{"a.b=1,a=2", "", "Parameters 'a.*' used inconsistently"},
		{"a..b=1", "", "Invalid parameter 'a..b'"},
		{"=1", "", "Invalid parameter ''"},
		{`{"a":`, "", "JSON parse error, premature EOI"},
		{`{"a":1} {}`, "", "Expecting at most one JSON value"},
		{`{"a":1} x`, "", "Expecting at most one JSON value"},
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
	run("nbd-server-start", "addr.path=nbd", "Parameter 'addr.type' is missing")
	run("nbd-server-start", "addr.type=unix,addr.path="+g.dir+"/nbd,max-connections=x", "Parameter 'max-connections' expects integer")
	run("nbd-server-start", "addr.type=unix,addr.path="+g.dir+"/nbd,max-connections=7", "")
	run("blockdev-add", "file,node-name=f,filename=a,active=maybe", "Parameter 'active' expects 'on' or 'off'")
	run("blockdev-add", "file,node-name=f,filename=a", "")
	run("blockdev-add", "raw,node-name=r,file=f,active=off", "")
	run("blockdev-add", `{"driver":"raw","node-name":"q","file":{"driver":"file","filename":"b"}}`, "")
	run("block-export-add", "nbd,id=e,node-name=r,writable=on,allow-inactive=on", "")
	run("block-export-add", "nbd,id=e,node-name=q", "Block export id 'e' is already in use")
	g.nodes("r f! q! #block001!")
	g.owned("a b!")
}
