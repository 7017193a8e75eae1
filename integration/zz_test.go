package integration
import ("testing";"time")
func TestZZ(t *testing.T) {
	e := serve(t, randomImage(t, tmpfsDir(t), 1, 64*mib), "--memory", "128M")
	for range 40 {
		c := dialRaw(t, e.socket, "")
		go func() {
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			c.Write(append(requestHeader(cmdWrite, 0, 1, 0, 32*mib)[:28], make([]byte, 31*mib)...))
		}()
	}
	for range 10 {
		c := dialRaw(t, e.socket, "")
		go func() {
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			for i := range uint64(64) {
				c.Write(requestHeader(cmdRead, 0, i, 0, 32*mib)[:28])
			}
		}()
	}
	time.Sleep(2500*time.Millisecond)
	other := dialRaw(t, e.socket, "")
	other.timeout = 200*time.Second
	for _, n := range []uint32{4096, 65536, 65536*2, mib, 32*mib} {
		b := time.Now()
		rep := other.do(cmdRead, 0, 0, n, nil)
		t.Log(n, "read", rep.errno, time.Since(b))
		b = time.Now()
		rep = other.do(cmdWrite, 0, 0, n, make([]byte, n))
		t.Log(n, "write", rep.errno, time.Since(b))
	}
	e.kill()
}
