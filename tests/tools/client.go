// A client of generated code: prints what came as one line of JSON. `client_go.sh` makes the code and runs this.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	v1 "denoised/v1"

	"google.golang.org/grpc"
)

func number[T any](value T) *T { return &value }

func main() {
	connection, err := grpc.Dial(os.Args[1], grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := v1.NewDiffusionServiceClient(connection).Generate(ctx, &v1.GenerateRequest{
		PromptAs: &v1.GenerateRequest_Prompt{Prompt: "In the beginning"},
		Length:   number[uint32](24),
		Sampling: &v1.Sampling{
			Steps:   number[uint32](8),
			Seed:    number[uint64](1),
			Sampler: &v1.Sampling_Tweedie{Tweedie: &v1.Tweedie{Normalize: true}},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	kinds, text, normalize := []string{}, "", false
	for {
		answer, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		switch event := answer.GetEvent().GetEvent().(type) {
		case *v1.Event_Accepted:
			kinds = append(kinds, "accepted")
			normalize = event.Accepted.GetSampling().GetTweedie().GetNormalize()
		case *v1.Event_Frame:
			kinds = append(kinds, "frame")
		case *v1.Event_Result:
			kinds = append(kinds, "result")
			text = event.Result.GetText()
		}
	}
	about, err := v1.NewServerServiceClient(connection).GetServer(ctx, &v1.GetServerRequest{})
	if err != nil {
		log.Fatal(err)
	}
	line, err := json.Marshal(map[string]any{
		"kinds": kinds, "text": text, "normalize": normalize, "steps": about.GetLimits().GetMaxSteps(),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(line))
}
