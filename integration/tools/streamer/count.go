package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"github.com/moby/spdystream/spdy"
)

// count asks a port of a pod for a file and counts what comes back, up to so many bytes: a client that does nothing else,
// so that the time it takes is the server's. It does not wait for the end of the stream, as no client does that was told a
// length.
func count(target *url.URL, port uint16, path string, wanted int64) (int64, error) {
	conn, err := net.Dial("tcp", target.Host)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	request, err := http.NewRequest(http.MethodPost, target.String(), nil)
	if err != nil {
		return 0, err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", "SPDY/3.1")
	request.Header.Set("X-Stream-Protocol-Version", "portforward.k8s.io")
	if err := request.Write(conn); err != nil {
		return 0, err
	}
	input := bufio.NewReaderSize(conn, 1<<20)
	response, err := http.ReadResponse(input, request)
	if err != nil {
		return 0, err
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		return 0, fmt.Errorf("no upgrade: %s", response.Status)
	}
	const errorStream, dataStream = 1, 3
	framer, err := spdy.NewFramer(conn, input)
	if err != nil {
		return 0, err
	}
	for _, stream := range []spdy.StreamId{errorStream, dataStream} {
		headers := http.Header{
			"Streamtype": {map[spdy.StreamId]string{errorStream: "error", dataStream: "data"}[stream]},
			"Port":       {strconv.Itoa(int(port))},
			"Requestid":  {"0"},
		}
		open := spdy.SynStreamFrame{StreamId: stream, Headers: headers}
		if err := framer.WriteFrame(&open); err != nil {
			return 0, err
		}
	}
	get := spdy.DataFrame{StreamId: dataStream, Data: []byte("GET " + path + " HTTP/1.0\r\n\r\n")}
	if err := framer.WriteFrame(&get); err != nil {
		return 0, err
	}
	var counted int64
	for head := make([]byte, 8); counted < wanted; {
		if _, err := io.ReadFull(input, head); err != nil {
			return counted, err
		}
		stream := binary.BigEndian.Uint32(head)
		length := int64(binary.BigEndian.Uint32(head[4:]) & 0xffffff)
		if _, err := io.CopyN(io.Discard, input, length); err != nil {
			return counted, err
		}
		// Frames that control have their highest bit set.
		if stream == dataStream {
			counted += length
		}
	}
	return counted, nil
}

func printCount(target *url.URL, words []string) error {
	if len(words) != 3 {
		usage()
	}
	port, err := strconv.ParseUint(words[0], 10, 16)
	if err != nil {
		return err
	}
	wanted, err := strconv.ParseInt(words[2], 10, 64)
	if err != nil {
		return err
	}
	counted, err := count(target, uint16(port), words[1], wanted)
	if err == nil {
		fmt.Println(counted)
	}
	return err
}
